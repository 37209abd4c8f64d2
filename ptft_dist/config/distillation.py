"""The distillation section of a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from ptft_dist.config.section import Fraction, ModelName, Positive, Section, Text, only_with


class DistillationSettings(Section):
    """Knowledge distillation: train on the teacher's probabilities and on the labels (Hinton et al. 2015).

    The loss is (1 - hard) x divergence x temperature^2 + hard x the task's own loss.
    """

    metric_names: ClassVar[tuple[str, ...]] = ("hard_loss", "divergence")
    """Metrics of an evaluation in addition to those of the task."""

    teacher: ModelName
    """The teacher: a local directory or a Hub name. It must have the same vocabulary or the same labels."""
    revision: Text | None = None
    """The commit, branch or tag of a Hub model."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """`forward_kl`: KL(teacher || student); `reverse_kl`: KL(student || teacher); `jsd`: the generalized
    Jensen-Shannon divergence (Agarwal et al. 2024)."""
    beta: Fraction | None = None
    """`jsd`: the teacher's weight in the mixture, above 0 and below 1. Default: 0.5."""
    temperature: Positive = 1.0
    """Temperature: the logits of both networks are divided by it in the divergence."""
    hard: Fraction = 0.5
    """The weight of the task's own loss."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        only_with(self, ("beta",), self.divergence == "jsd", "divergence: jsd")
        if self.beta in (0.0, 1.0):
            raise ValueError("beta: it must be above 0 and below 1; for the limits use forward_kl or reverse_kl")
        if self.hard == 1.0:
            raise ValueError("hard: with 1 the teacher has no effect; lower it, or remove the section")
        return self
