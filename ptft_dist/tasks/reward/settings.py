"""Settings of reward modelling."""

from __future__ import annotations

from ptft_dist.config.section import NonNegative
from ptft_dist.tasks.common.preference_settings import PreferenceSettings


class RewardSettings(PreferenceSettings):
    """Settings of a reward model: a network with a scalar head, trained on pairs (Bradley-Terry)."""

    section = "reward"
    after_prepare = ("center_rewards_coefficient", "dropout")

    center_rewards_coefficient: NonNegative = 0.0
    """Weight of the mean of (chosen + rejected)^2, which keeps the mean reward near 0 (Eisenstein et al. 2023); 0.01 is
    usual."""
    dropout: bool = False
    """Keep the network's dropout in training. Off by default, as in TRL. The dropout of an adapter has a setting of its
    own."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        from ptft_dist.tasks.common.scores.preferences import NAMES

        return "loss", *NAMES
