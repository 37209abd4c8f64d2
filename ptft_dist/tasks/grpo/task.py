"""GRPO: group relative policy optimization (Shao et al. 2024), and its variants Dr. GRPO and DAPO."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ptft_dist.data.store import Row
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.rl.losses import kl_loss
from ptft_dist.rl.rollout import Trajectory
from ptft_dist.tasks.common.group_policy import GroupPolicyTask
from ptft_dist.tasks.grpo.settings import GrpoSettings
from ptft_dist.tasks.protocol import TaskSetup


class Grpo(GroupPolicyTask):
    """Advantages are scores relative to their group; the KL to the reference is part of the loss."""

    settings: GrpoSettings

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.clip_high = self.settings.clip if self.settings.clip_high is None else self.settings.clip_high

    def advantages(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        scores = np.array([each.score for each in trajectories], np.float32)
        return self.spread(trajectories, scores, "group_mean", scale=self.settings.scale_rewards)

    def penalty(self, _logprobs: torch.Tensor, _inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        if not self.settings.kl:
            return torch.zeros_like(mask)
        return self.settings.kl * kl_loss(_logprobs, _inputs["reference"], mask)

    def token_weights(self, mask: torch.Tensor) -> torch.Tensor:
        """`dapo`: 1; `grpo`: 1 / tokens of the response; `dr_grpo`: 1 / max_new_tokens."""
        if self.settings.normalization == "dapo":
            return mask
        if self.settings.normalization == "grpo":
            return mask / mask.sum(1, keepdim=True).clamp(min=1)
        return mask / self.settings.sampling.max_new_tokens

    def count_of(self, rows: Sequence[Row]) -> float:
        """`dapo`: response tokens; otherwise responses."""
        return super().count_of(rows) if self.settings.normalization == "dapo" else float(len(rows))
