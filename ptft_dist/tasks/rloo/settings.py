"""Settings of RLOO."""

from __future__ import annotations

from ptft_dist.tasks.common.group_settings import GroupSettings


class RlooSettings(GroupSettings):
    """Settings of RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024)."""

    section = "rloo"

    whiten_advantages: bool = False
    """Give the advantages of a rollout mean 0 and variance 1."""
