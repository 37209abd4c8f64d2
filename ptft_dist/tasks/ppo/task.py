"""PPO: proximal policy optimization of a causal network (Schulman et al. 2017) with rewards of whole responses.

The parts, in the order of a phase:
    1. `rollout` (tasks/common/rollouts.py) samples responses and scores them.
    2. `advantages` turns scores, KL penalties and values into what each token learns.
    3. `loss` is the clipped objective of the policy, the value loss and the entropy bonus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ptft_dist.config.recipe import ModelSection
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.networks.value_head import add_value_head
from ptft_dist.rl.advantages import adapted_kl_coefficient, explained_variance, gae, token_rewards, whiten
from ptft_dist.rl.losses import clipped_policy_loss, clipped_value_loss, detached
from ptft_dist.rl.rollout import Trajectory
from ptft_dist.tasks.common.rollouts import RolloutTask
from ptft_dist.tasks.ppo.settings import PpoSettings
from ptft_dist.tasks.protocol import IGNORE, LossOut, TaskSetup


class Ppo(RolloutTask):
    """Policy and critic are one network, which is trained on the sum of their losses."""

    settings: PpoSettings

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.kl_coefficient = self.settings.kl

    def extend_network(self, model: Any, section: ModelSection) -> None:
        """Add the value head, whose values are 0 at the start."""
        super().extend_network(model, section)
        add_value_head(model, self.network.hidden_size)

    def values(self, model: Any, states: torch.Tensor) -> torch.Tensor:
        """V of the states before each response token: fp32 [B, R]. states: last hidden states [B, R, H]."""
        values: torch.Tensor = model.value_head(states.to(model.value_head.weight.dtype))
        return values.float().squeeze(-1)

    def look_at_policy(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logprobs, _, states = self.policy(model, inputs, hidden=True)
        return {"logprobs": logprobs, "values": self.values(model, states)}

    def advantages(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """Rewards of tokens, GAE, returns and whitening; then the coefficient of the KL penalty is adapted."""
        settings = self.settings
        rewards = []
        for each in trajectories:
            kl = self.kl_of(each) if settings.kl else np.zeros(len(each.response), np.float32)
            rewards.append(token_rewards(each.score, kl, self.kl_coefficient))
        if settings.whiten_rewards:
            rewards = whiten(rewards, shift_mean=False)
        for each, reward in zip(trajectories, rewards, strict=True):
            values = each.tokens["values"]
            each.tokens["advantages"] = gae(reward, values, settings.gamma, settings.lam)
            each.tokens["returns"] = each.tokens["advantages"] + values
        values, returns = (np.concatenate([t.tokens[name] for t in trajectories]) for name in ("values", "returns"))
        metrics = {"explained_variance": explained_variance(values, returns), "kl_coefficient": self.kl_coefficient}
        if settings.whiten_advantages:
            whitened = whiten([each.tokens["advantages"] for each in trajectories])
            for each, advantages in zip(trajectories, whitened, strict=True):
                each.tokens["advantages"] = advantages
        if settings.kl_target is not None:
            mean_kl = float(np.mean([self.kl_of(each).sum() for each in trajectories]))
            self.kl_coefficient = adapted_kl_coefficient(
                self.kl_coefficient, mean_kl, settings.kl_target, len(trajectories), settings.kl_horizon
            )
        return metrics

    @property
    def token_columns(self) -> tuple[str, ...]:
        return "logprobs", "advantages", "values", "returns"

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """The summed loss over response tokens (Schulman et al. 2017, equation 9, with its sign changed)."""
        settings, mask = self.settings, (inputs["targets"] != IGNORE).float()
        logprobs, entropy, states = self.policy(model, inputs, hidden=True)
        values = self.values(model, states)
        policy = clipped_policy_loss(
            logprobs, inputs["logprobs"], inputs["advantages"], mask, settings.clip, settings.clip
        )
        value_losses, value_metrics = clipped_value_loss(
            values, inputs["values"], inputs["returns"], mask, settings.value_clip
        )
        policy_sum, value_sum, entropy_sum = policy.losses.sum(), value_losses.sum(), (entropy * mask).sum()
        total = policy_sum + settings.value_coefficient * value_sum - settings.entropy_coefficient * entropy_sum
        count = mask.sum()
        shown = detached(policy_loss=(policy_sum, count), value_loss=(value_sum, count), entropy=(entropy_sum, count))
        return LossOut(total, {**shown, **policy.metrics, **value_metrics})

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"kl_coefficient": self.kl_coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.kl_coefficient = float(state["kl_coefficient"])

    def phase_is_over(self, metrics: Mapping[str, float]) -> bool:
        return self.settings.target_kl is not None and metrics["approx_kl"] > self.settings.target_kl
