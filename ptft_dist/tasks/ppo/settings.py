"""Settings of PPO."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.section import Fraction, ModelName, NonNegative, Positive
from ptft_dist.tasks.common.rollout_settings import RolloutSettings


class PpoSettings(RolloutSettings):
    """Settings of PPO (Schulman et al. 2017) with a reward at the end of each response (Ziegler et al. 2019)."""

    section = "ppo"

    critic: ModelName | None = None
    """A network of its own as critic, initialized from this directory or Hub name: a reward model, or the policy's
    model.path. It must have the policy's tokenizer. Default: a linear layer on the policy's last hidden states."""
    epochs: PositiveInt = 4
    """Passes over the responses of a rollout."""
    kl_target: Positive | None = None
    """Adapt the coefficient `kl` so that the KL per response stays near this (Ziegler et al. 2019)."""
    kl_horizon: PositiveInt = 10_000
    """With kl_target: responses over which the coefficient adapts."""
    gamma: Fraction = 1.0
    """Discount of later rewards."""
    lam: Fraction = 0.95
    """GAE's lambda (Schulman et al. 2016)."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The ratio of new and old probabilities is clipped to [1 - clip, 1 + clip]."""
    value_clip: Positive | None = 0.2
    """Values are clipped to this distance from the old ones; null: no clipping."""
    value_coefficient: Positive = 0.1
    """Weight of the value loss."""
    entropy_coefficient: NonNegative = 0.0
    """Weight of the entropy bonus."""
    whiten_advantages: bool = True
    """Give the advantages of a rollout mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Give the rewards of the tokens of a rollout variance 1."""
    target_kl: Positive | None = None
    """End the updates of a rollout once the KL from the policy that sampled it exceeds this."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kl_horizon != 10_000 and self.kl_target is None:
            raise ValueError("kl_horizon: has no effect here: it needs kl_target")
        if self.kl_target is not None and self.kl_horizon <= 0.2 * self.prompts:  # the error is clipped to 20 %
            raise ValueError(f"kl_horizon: kl could become negative; use more than a fifth of prompts ({self.prompts})")
        if self.kl_target is not None and not self.kl:
            raise ValueError("kl_target: it adapts the coefficient kl, which must be above 0")
        return self
