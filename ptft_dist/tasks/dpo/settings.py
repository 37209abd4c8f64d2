"""Settings of direct preference optimization."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ptft_dist.config.section import NonNegative, only_with
from ptft_dist.tasks.common.reference_settings import ReferenceSettings

WITHOUT_REFERENCE = ("simpo", "orpo")
GAMMA = 0.5


class DpoSettings(ReferenceSettings):
    """Settings of DPO (Rafailov et al. 2023) and related losses on pairs."""

    section = "dpo"
    after_prepare = ("loss", "beta", "label_smoothing", "gamma", "reference", "head")

    loss: Literal["sigmoid", "robust", "hinge", "ipo", "simpo", "orpo"] = "sigmoid"
    """`sigmoid`: DPO. `robust`: DPO for noisy labels (Chowdhury et al. 2024). `hinge`: SLiC (Zhao et al. 2023). `ipo`:
    Azar et al. 2024, averaged over tokens. `simpo` (Meng et al. 2024) and `orpo` (Hong et al. 2024): no reference."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """The probability that chosen and rejected are exchanged in the data: with sigmoid it is cDPO's smoothing."""
    gamma: NonNegative | None = None
    """SimPO's margin of the rewards. Default: 0.5."""

    @model_validator(mode="after")
    def _check_loss(self) -> Self:
        smoothed = ("sigmoid", "robust", "simpo")
        only_with(self, ("label_smoothing",), self.loss in smoothed, f"one of the losses {', '.join(smoothed)}")
        only_with(self, ("gamma",), self.loss == "simpo", "loss: simpo")
        only_with(self, ("reference",), self.has_reference, f"a loss with a reference, and not {self.loss}")
        if self.loss == "robust" and self.label_smoothing == 0:
            raise ValueError("loss: robust needs label_smoothing, the share of exchanged pairs; without it use sigmoid")
        return self

    @property
    def has_reference(self) -> bool:
        return self.loss not in WITHOUT_REFERENCE

    @property
    def metric_names(self) -> tuple[str, ...]:
        sides = [f"{name}/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected")]
        more = ("nll_loss", "log_odds_ratio") if self.loss == "orpo" else ()
        return "loss", "accuracy", "margin", *sides, *more
