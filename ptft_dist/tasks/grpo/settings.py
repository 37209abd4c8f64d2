"""Settings of GRPO."""

from __future__ import annotations

from typing import Literal

from ptft_dist.config.section import NonNegative, Positive
from ptft_dist.tasks.common.group_settings import GroupSettings


class GrpoSettings(GroupSettings):
    """Settings of GRPO (Shao et al. 2024), Dr. GRPO (Liu et al. 2025) and DAPO's loss (Yu et al. 2025)."""

    section = "grpo"

    clip_high: Positive | None = None
    """The upper limit of the ratio is 1 + this. Default: `clip`."""
    normalization: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    """`grpo`: mean over the tokens of each response, then over responses. `dr_grpo`: sum over tokens, divided by
    max_new_tokens. `dapo`: mean over all tokens of the update."""
    scale_rewards: bool = True
    """Divide advantages by the standard deviation of their group. False with Dr. GRPO."""
    kl: NonNegative = 0.0
    """Coefficient of the KL (estimator k3) to the reference, which is added to the loss. 0: no reference is needed."""
    kl_estimator: Literal["k3"] = "k3"
    """GRPO's estimator of the KL."""
