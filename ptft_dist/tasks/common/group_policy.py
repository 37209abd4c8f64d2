"""Policy gradients without a critic: the baseline of a response is the group of responses to the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from ptft_dist.rl.advantages import group_advantages
from ptft_dist.rl.losses import clipped_policy_loss, detached
from ptft_dist.rl.rollout import Trajectory
from ptft_dist.tasks.common.group_settings import GroupSettings
from ptft_dist.tasks.common.rollouts import RolloutTask
from ptft_dist.tasks.protocol import IGNORE, LossOut


class GroupPolicyTask(RolloutTask):
    """The clipped objective of PPO with one advantage for all tokens of a response."""

    settings: GroupSettings
    clip_high: float

    def spread(
        self,
        trajectories: Sequence[Trajectory],
        scores: np.ndarray,
        baseline: Literal["group_mean", "leave_one_out"],
        *,
        scale: bool,
    ) -> dict[str, float]:
        """Give all tokens of each response its advantage; return metrics. scores: [N]."""
        advantages = group_advantages(scores, self.settings.group_size, baseline, scale=scale)
        for each, advantage in zip(trajectories, advantages, strict=True):
            each.tokens["advantages"] = np.full(len(each.response), advantage, np.float32)
        groups = scores.reshape(-1, self.settings.group_size)
        return {"groups_without_spread": float((np.ptp(groups, axis=1) == 0).mean())}  # std of equal numbers may round

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """The summed loss over response tokens, each with its weight."""
        mask = (inputs["targets"] != IGNORE).float()
        logprobs, entropy, _ = self.policy(model, inputs)
        policy = clipped_policy_loss(
            logprobs, inputs["logprobs"], inputs["advantages"], mask, self.settings.clip, self.clip_high
        )
        losses = policy.losses + self.penalty(logprobs, inputs, mask)
        count = mask.sum()
        shown = detached(entropy=((entropy * mask).sum(), count), policy_loss=(policy.losses.sum(), count))
        return LossOut((losses * self.token_weights(mask)).sum(), {**shown, **policy.metrics})

    def penalty(self, _logprobs: torch.Tensor, _inputs: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        """What is added to the loss of each token: [B, R]."""
        return torch.zeros_like(mask)

    def token_weights(self, mask: torch.Tensor) -> torch.Tensor:
        """The weight of each token's loss: [B, R]. `count_of` must be the sum that the mean divides by."""
        return mask
