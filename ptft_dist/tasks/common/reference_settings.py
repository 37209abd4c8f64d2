"""Settings shared by tasks that compare a network with its reference."""

from __future__ import annotations

from typing import ClassVar, Literal

from ptft_dist.config.section import Positive
from ptft_dist.tasks.common.preference_settings import PreferenceSettings


class ReferenceSettings(PreferenceSettings):
    """Settings of tasks that learn from preferences without a reward model."""

    may_change = ("head",)
    writes: ClassVar[bool] = True
    without_dropout: ClassVar[bool] = True

    beta: Positive = 0.1
    """How near the network stays to the reference: the factor of the log-ratios. For simpo that of the mean
    log-probability (2.0 is usual there), for orpo the weight of the odds ratio."""
    reference: Literal["cached", "network"] | None = None
    """Where the reference's log-probabilities come from, if all or some weights of model.path are trained. `cached`
    (default): they are computed once for all rows before training and kept in the cache directory, so no second network
    is in memory. `network`: a second, frozen copy of model.path computes them in every update. With an adapter, the
    reference is always the base with the adapter off."""
    head: Literal["auto", "fused", "logits"] = "auto"
    """See clm.head."""

    @property
    def has_reference(self) -> bool:
        """Whether the loss has a reference."""
        return True
