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
from ptft_dist.errors import RecipeError
from ptft_dist.networks.critic import add_critic, add_value_head, token_values
from ptft_dist.networks.facts import NetworkFacts, read_facts
from ptft_dist.networks.frozen import FrozenSource
from ptft_dist.networks.names import directory_or_hub_name, is_adapter
from ptft_dist.rl.advantages import adapted_kl_coefficient, explained_variance, gae, token_rewards, whiten
from ptft_dist.rl.losses import clipped_policy_loss, clipped_value_loss, detached
from ptft_dist.rl.rollout import Trajectory
from ptft_dist.tasks.common.dropout import turn_off_dropout
from ptft_dist.tasks.common.network_checks import check_room, check_same_tokens
from ptft_dist.tasks.common.rollouts import RolloutTask
from ptft_dist.tasks.ppo.settings import PpoSettings
from ptft_dist.tasks.protocol import IGNORE, LossOut, TaskSetup


class Ppo(RolloutTask):
    """Policy and critic are trained on the sum of their losses. The critic is a head on the policy, or a network."""

    settings: PpoSettings

    @classmethod
    def check_setup(cls, setup: TaskSetup, frozen: Mapping[str, FrozenSource]) -> None:
        """Also check the critic's config and tokenizer."""
        super().check_setup(setup, frozen)
        if (source := _critic_of(setup)) is not None:
            if is_adapter(source.path):
                raise RecipeError(
                    f"{source.key}: {source.path} is an adapter, and a critic is trained as a whole network. Merge it "
                    "into its base with ptft merge, and name the merged model"
                )
            check_same_tokens(setup, source)
            positions = getattr(source.config().get_text_config(), "max_position_embeddings", None)
            if isinstance(positions, int) and positions > 0:
                check_room(setup, positions, f"the critic's max_position_embeddings ({positions})")

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.kl_coefficient = self.settings.kl

    def extend_network(self, model: Any, section: ModelSection) -> None:
        """Add the critic. The values of a new head are 0 at the start."""
        super().extend_network(model, section)
        if (source := _critic_of(self.setup)) is None:
            add_value_head(model, self.network.hidden_size)
            return
        critic = add_critic(model, source)
        self.critic_takes = read_facts(critic).takes
        turn_off_dropout(critic)

    def policy_and_values(
        self, model: Any, inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities of the response tokens, entropies, and V of the states before each token: fp32 [B, R]."""
        own = self.settings.critic is not None
        logprobs, entropy, states = self.policy(model, inputs, hidden=not own)
        if own:
            names = ["input_ids", "attention_mask", *(["position_ids"] if self.critic_takes("position_ids") else [])]
            values = token_values(model.critic, {name: inputs[name] for name in names})
            return logprobs, entropy, values[:, -logprobs.size(1) - 1 : -1]
        head = model.value_head
        return logprobs, entropy, head(states.to(head.weight.dtype)).float().squeeze(-1)

    def look_at_policy(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        logprobs, _, values = self.policy_and_values(model, inputs)
        return {"logprobs": logprobs, "values": values}

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
        logprobs, entropy, values = self.policy_and_values(model, inputs)
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


def _critic_of(setup: TaskSetup) -> FrozenSource | None:
    """What the critic is initialized from, which is loaded as the policy is; None for a head on the policy."""
    key, path = f"{setup.name}.critic", setup.settings.critic
    if path is None:
        return None
    section = ModelSection(
        path=directory_or_hub_name(path, setup.base, key),
        dtype="fp32",
        attention=setup.model.attention,
        trust_remote_code=setup.model.trust_remote_code,
    )
    return FrozenSource(key, section)
