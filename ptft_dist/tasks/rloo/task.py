"""RLOO: REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.rl.advantages import whiten
from ptft_dist.rl.rollout import Trajectory
from ptft_dist.tasks.common.group_policy import GroupPolicyTask
from ptft_dist.tasks.protocol import TaskSetup
from ptft_dist.tasks.rloo.settings import RlooSettings


class Rloo(GroupPolicyTask):
    """The score of a response includes the KL penalty of all its tokens; its baseline is the mean of the others."""

    settings: RlooSettings

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.clip_high = self.settings.clip

    @property
    def token_columns(self) -> tuple[str, ...]:
        return "logprobs", "advantages"

    def advantages(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        kl = [self.settings.kl * self.kl_of(each).sum() if self.settings.kl else 0.0 for each in trajectories]
        scores = np.array([each.score for each in trajectories], np.float32) - np.array(kl, np.float32)
        metrics = self.spread(trajectories, scores, "leave_one_out", scale=False)
        if self.settings.whiten_advantages:
            whitened = whiten([each.tokens["advantages"] for each in trajectories])
            for each, advantages in zip(trajectories, whitened, strict=True):
                each.tokens["advantages"] = advantages
        return metrics
