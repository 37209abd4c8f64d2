"""Settings of sampling and of rewards, for tasks that learn from their own responses."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.section import ModelName, Positive, Section, Text, exactly_one, only_with


class SamplingSettings(Section):
    """How responses are sampled."""

    max_new_tokens: PositiveInt = 64
    """The most tokens of a response."""
    temperature: Positive = 1.0
    """Logits are divided by it, when responses are sampled and in all log-probabilities of the policy."""
    top_k: PositiveInt | None = None
    """Sample from this many of the most probable tokens only."""
    top_p: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Sample from the most probable tokens with this total probability only."""
    min_p: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Sample only tokens with at least this many times the probability of the most probable one."""
    micro_size: PositiveInt | None = None
    """Responses that one process samples at a time. Default: 4 x batch.micro_size."""


class RewardSource(Section):
    """One source of rewards."""

    model: ModelName | None = None
    """A reward model: a directory or a Hub name, such as the model of a run of task reward."""
    revision: Text | None = None
    """The commit, branch or tag of a Hub model."""
    function: Text | None = None
    """A function `module:name` (or `module.name`) with TRL's signature f(completions, **columns) -> list of numbers, or
    None where it does not apply; such as `trl.rewards:think_format_reward`. The module may lie beside the recipe."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments for the function. If it makes the reward function, as TRL's `get_...` do, give `make: true`."""
    make: bool = False
    """Call the function once with `arguments` to get the reward function."""
    weight: float = 1.0
    """The score of a response is the sum of its rewards times their weights."""
    name: Text | None = None
    """The name in metrics. Default: the last part of the path or of the function."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        exactly_one(self, "model", "function")
        only_with(self, ("arguments", "make"), self.function is not None, "a function")
        only_with(self, ("revision",), self.model is not None, "a model")
        return self

    @property
    def label(self) -> str:
        if self.name is not None:
            return self.name
        if self.function is not None:
            return re.split(r"[:.]", self.function)[-1]
        parts = [part for part in str(self.model).rstrip("/").split("/") if part != "model"]
        return parts[-1] if parts else "model"
