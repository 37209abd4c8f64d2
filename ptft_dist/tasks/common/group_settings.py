"""Settings shared by policy gradients without a critic."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from ptft_dist.tasks.common.rollout_settings import RolloutSettings


class GroupSettings(RolloutSettings):
    """Settings of policy gradients without a critic: the baseline of a response is the group for the same prompt."""

    prompts: PositiveInt = 16
    """Prompts of one rollout, over all processes."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Responses for each prompt."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The ratio of new and old probabilities is clipped to [1 - clip, 1 + clip]."""

    @property
    def samples_per_prompt(self) -> int:
        return self.group_size
