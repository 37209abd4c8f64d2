"""Settings of sampling and of rewards, for tasks that learn from their own responses."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.section import ModelName, Positive, Section, Text, exactly_one, only_with


class VllmSettings(Section):
    """Sampling with vLLM (pip install 'ptft_dist[vllm]'; needs a GPU)."""

    server: Text | None = None
    """The address of a running `vllm serve`, such as http://node7:8000. Default: vLLM runs in each process of the
    training, on the same GPU."""
    memory: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    """Without a server: the share of the GPU's memory for vLLM."""
    sleep: bool = True
    """Without a server: vLLM gives this memory back while it does not sample."""
    max_weight: Positive = 2.0
    """vLLM's log-probabilities are not quite those of the trained network. What a token learns is multiplied by the
    ratio of both probabilities, at most this (truncated importance sampling, Yao et al. 2025)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.server is not None:
            for name in {"memory", "sleep"} & self.model_fields_set:
                raise ValueError(f"{name}: has no effect with a server, which has settings of its own")
            if not self.server.startswith(("http://", "https://")):
                raise ValueError(f"server: {self.server!r} is no address; write it as http://HOST:PORT")
        return self


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
    vllm: VllmSettings | None = None
    """Sample rollouts with vLLM instead of transformers; {} for its defaults. Evaluations always use transformers."""


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
