"""The section about learning from a teacher."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from ptft_dist.config.section import Fraction, Positive, Section, Text, only_with


class DistillationSettings(Section):
    """A student learns the teacher's probabilities, and the labels (Hinton et al. 2015).

    The loss is (1 - hard) x divergence x temperature^2 + hard x the task's own loss.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("hard_loss", "divergence")
    """The metrics that an evaluation has beside those of the task."""

    teacher: Text
    """A local directory or a Hub name: a model of the same kind, with the same vocabulary or the same labels."""
    revision: Text | None = None
    """The commit, branch or tag of a Hub model."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """`forward_kl`: KL(teacher || student); `reverse_kl`: KL(student || teacher); `jsd`: the generalised
    Jensen-Shannon divergence (Agarwal et al. 2024)."""
    beta: Fraction | None = None
    """`jsd`: the teacher's share of the mixture, between 0 and 1, both excluded; 0.5 when not given."""
    temperature: Positive = 1.0
    """Both networks' logits are divided by this in the divergence."""
    hard: Fraction = 0.5
    """The share of the task's own loss."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        only_with(self, ("beta",), self.divergence == "jsd", "divergence: jsd")
        if self.beta in (0.0, 1.0):
            raise ValueError("beta: 0 and 1 are no mixture; use forward_kl or reverse_kl")
        if self.hard == 1.0:
            raise ValueError("hard: 1 means that the teacher has no effect")
        return self
