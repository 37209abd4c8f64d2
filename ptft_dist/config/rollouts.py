"""Settings that PPO, GRPO and RLOO share: prompts, sampling, rewards, and the KL penalty."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.section import Fraction, NonNegative, Positive, Section, Text, exactly_one, only_with
from ptft_dist.config.task_settings import TaskSettings

CHATML = ("<|im_start|>", "<|im_end|>")


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

    model: Text | None = None
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


class RolloutSettings(TaskSettings):
    """Settings of reinforcement learning from rewards."""

    may_change: ClassVar[tuple[str, ...]] = ("show",)
    text_settings: ClassVar[tuple[str, ...]] = ("system",)
    writes: ClassVar[bool] = True
    group_size: ClassVar[int] = 1
    """Responses for each prompt; a setting of tasks with groups."""

    prompts: PositiveInt = 64
    """Prompts of one rollout, over all processes. A rollout is followed by epochs x (its responses / batch.global_size)
    updates; checkpoints, evaluations and stops happen between rollouts."""
    epochs: PositiveInt = 1
    """Passes over the responses of a rollout."""
    sampling: SamplingSettings = SamplingSettings()
    """How responses are sampled."""
    rewards: tuple[RewardSource, ...] = ()
    """Reward models and functions."""
    normalize_rewards: bool = False
    """Divide scores by their running standard deviation over all responses so far, and subtract their running mean."""
    clip_rewards: Positive | None = None
    """Clip scores to [-this, this]."""
    missing_eos_penalty: NonNegative | None = None
    """Subtracted from the score of a response without an end. Looked for in the response only."""
    length_target: PositiveInt | None = None
    """Responses may have this many tokens before `length_penalty` applies."""
    length_penalty: Positive | None = None
    """Subtracted from the score for each token above `length_target`."""
    kl: NonNegative = 0.05
    """Coefficient of the KL penalty that keeps the policy near the reference, which is the network that training
    starts from. 0: no reference is needed."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL from the sampled tokens (Schulman 2020)."""
    template: Text | None = None
    """The chat template for prompts that are conversations; see sft.template."""
    system: Text | None = None
    """A system message for conversations without one."""
    too_long: Literal["drop", "cut"] = "drop"
    """A prompt longer than data.max_length is dropped, or loses its beginning (`cut`); both are counted."""
    show: Annotated[int, Field(ge=0)] = 3
    """Responses of each rollout and of each evaluation that are written to samples.jsonl and TensorBoard."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_more: Any) -> None:
        cls.after_prepare = tuple(name for name in cls.model_fields if name not in ("template", "system", "too_long"))

    @model_validator(mode="after")
    def _check_rewards(self) -> Self:
        labels = [source.label for source in self.rewards]
        if len(set(labels)) < len(labels):
            raise ValueError(f"rewards: several have the name {max(labels, key=labels.count)!r}; set their `name`")
        if (self.length_target is None) != (self.length_penalty is None):
            raise ValueError("length_target and length_penalty need each other")
        return self

    @property
    def responses(self) -> int:
        """Responses of one rollout."""
        return self.prompts * self.group_size

    def updates_of_rollout(self, global_size: int) -> int:
        """Updates that follow one rollout."""
        return self.epochs * self.responses // global_size

    @property
    def rollout_prompts(self) -> int:
        return self.prompts

    def batch_problems(self, global_size: int | None) -> Iterator[tuple[str, str]]:
        """Settings that do not fit the batch size: (name, problem)."""
        if not self.rewards:
            yield (
                "rewards",
                "required: name a reward model or a function, such as rewards: [{model: runs/reward/model}]",
            )
        if global_size is None:
            yield "prompts", "a rollout is split into updates by rows: set batch.global_size instead of global_tokens"
        elif self.responses % global_size:
            yield (
                "prompts",
                f"a rollout has {self.responses} responses, which is not a multiple of batch.global_size "
                f"({global_size}), the responses of one update",
            )

    @property
    def roles(self) -> tuple[str, ...]:
        return "prompt", "messages"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return f"eos={CHATML[1]}", "bos", "pad"

    @property
    def extra_special_tokens(self) -> tuple[str, ...]:
        return CHATML[:1]

    @property
    def metric_names(self) -> tuple[str, ...]:
        labels = tuple(f"reward/{source.label}" for source in self.rewards) if len(self.rewards) > 1 else ()
        return "loss", "reward", *labels, "response_tokens", "without_eos", *(("kl",) if self.kl else ())


class PpoSettings(RolloutSettings):
    """Settings of PPO (Schulman et al. 2017) with a reward at the end of each response (Ziegler et al. 2019)."""

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
    critic: Literal["head", "policy", "reward"] = "head"
    """Where values come from. `head`: a linear head on the policy's last hidden states. `policy`, `reward`: a network
    of its own, which starts as a copy of model.path or of the first reward model."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kl_horizon != 10_000 and self.kl_target is None:
            raise ValueError("kl_horizon: has no effect here: it needs kl_target")
        if self.kl_target is not None and not self.kl:
            raise ValueError("kl_target: it adapts the coefficient kl, which must be above 0")
        return self


class GroupSettings(RolloutSettings):
    """Settings of policy gradients without a critic: the baseline of a response is the group for the same prompt."""

    prompts: PositiveInt = 16
    """Prompts of one rollout, over all processes."""
    group_size: Annotated[int, Field(ge=2)] = 8  # type: ignore[misc]
    """Responses for each prompt."""
    clip: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """The ratio of new and old probabilities is clipped to [1 - clip, 1 + clip]."""


class GrpoSettings(GroupSettings):
    """Settings of GRPO (Shao et al. 2024), Dr. GRPO (Liu et al. 2025) and DAPO's loss (Yu et al. 2025)."""

    clip_high: Positive | None = None
    """The upper limit of the ratio is 1 + this. Default: `clip`."""
    normalization: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    """`grpo`: mean over the tokens of each response, then over responses. `dr_grpo`: sum over tokens, divided by
    max_new_tokens. `dapo`: mean over all tokens of the update."""
    scale_rewards: bool = True
    """Divide advantages by the standard deviation of their group. False with Dr. GRPO."""
    kl: NonNegative = 0.0
    """Coefficient of the KL (estimator k3) to the reference, which is added to the loss. 0: no reference is needed."""
    kl_estimator: Literal["k3"] = "k3"
    """GRPO's estimator of the KL."""


class RlooSettings(GroupSettings):
    """Settings of RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024)."""

    whiten_advantages: bool = False
    """Give the advantages of a rollout mean 0 and variance 1."""
