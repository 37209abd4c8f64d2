"""Settings of Kahneman-Tversky optimization."""

from __future__ import annotations

from typing import Literal

from ptft_dist.config.section import NonNegative
from ptft_dist.tasks.common.reference_settings import ReferenceSettings


class KtoSettings(ReferenceSettings):
    """Settings of KTO (Ethayarajh et al. 2024), which learns from answers that are labelled desirable or not."""

    section = "kto"
    after_prepare = ("loss", "beta", "desirable_weight", "undesirable_weight", "reference", "head")

    shape: Literal["auto", "unpaired", "messages", "preference", "single_turn", "hh", "sharegpt"] = "auto"  # type: ignore[assignment]
    """The format of the rows. `unpaired`: TRL's prompt and completion, as texts or as lists of messages, and a label
    (true: desirable). `messages`: a conversation whose last message is the answer, and a label. `preference`,
    `single_turn`, `hh`, `sharegpt`: pairs as in dpo.shape; the chosen answer becomes a desirable row and the rejected
    one an undesirable row. `auto`: from each file's first row, whose shape all its rows must share; it never chooses
    `single_turn`."""
    too_long: Literal["drop", "cut"] = "drop"
    """Answers that end after data.max_length are dropped (of a pair: both), or truncated at the end (`cut`), as in TRL.
    Both are counted. A row whose prompt fills data.max_length is always dropped."""
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """`kto`, or `apo_zero_unpaired` (D'Oosterlinck et al. 2024), which has no estimate of the KL divergence."""
    desirable_weight: NonNegative = 1.0
    """Weight of desirable rows."""
    undesirable_weight: NonNegative = 1.0
    """Weight of undesirable rows. (desirable_weight x desirable rows) : (undesirable_weight x undesirable rows) should
    lie between 1:1 and 4:3 (Ethayarajh et al. 2024, equation 8)."""

    @property
    def roles(self) -> tuple[str, ...]:
        return (*super().roles, "completion", "label", "messages")

    @property
    def text_roles(self) -> tuple[str, ...]:
        return (*super().text_roles, "completion", "messages")

    @property
    def estimates_kl(self) -> bool:
        return self.loss == "kto"

    @property
    def metric_names(self) -> tuple[str, ...]:
        sides = [f"{name}/{side}" for name in ("rewards", "logps") for side in ("chosen", "rejected")]
        return "loss", "margin", *sides, *(["kl"] if self.estimates_kl else [])
