"""Settings shared by tasks that learn from rewards of their own responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.rollouts import RewardSource, SamplingSettings
from ptft_dist.config.section import NonNegative, Positive
from ptft_dist.tasks.common.chat_settings import ChatSettings


class RolloutSettings(ChatSettings):
    """Settings of reinforcement learning from rewards."""

    may_change = ("show", "sampling.vllm.server", "sampling.vllm.memory", "sampling.vllm.sleep")
    writes = True
    without_dropout = True
    prompts: PositiveInt = 64
    """Prompts of one rollout, over all processes. Each has one response (ppo) or group_size of them (grpo, rloo). The
    responses are learned from in updates of batch.global_size responses, `epochs` times. Runs are saved, evaluated and
    stopped between rollouts only."""
    epochs: PositiveInt = 1
    """Passes over the responses of a rollout."""
    sampling: SamplingSettings = SamplingSettings()
    """Length, temperature and other options of the responses."""
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
    shape: Literal["auto", "single_turn"] = "auto"
    """`auto`: prompts are texts or conversations (lists of messages), as they are given. `single_turn`: a text is the
    user's message of a conversation."""
    too_long: Literal["drop", "cut"] = "drop"
    """A prompt longer than data.max_length is dropped, or loses its beginning (`cut`); both are counted."""
    show: Annotated[int, Field(ge=0)] = 3
    """Responses of each rollout and of each evaluation that are written to samples.jsonl and TensorBoard."""

    @classmethod
    def __pydantic_init_subclass__(cls, **_more: Any) -> None:
        cls.after_prepare = tuple(
            name for name in cls.model_fields if name not in ("template", "system", "shape", "too_long")
        )

    @model_validator(mode="after")
    def _check_rewards(self) -> Self:
        labels = [source.label for source in self.rewards]
        if len(set(labels)) < len(labels):
            raise ValueError(f"rewards: several have the name {max(labels, key=labels.count)!r}; set their `name`")
        if self.rewards and not any(source.weight for source in self.rewards):
            raise ValueError("rewards: all weights are 0, so nothing would be learned; give one source another weight")
        if "reference" in (source.label for source in self.rewards if source.model is not None):
            raise ValueError("rewards: the name 'reference' means the network of `kl`; give this model another `name`")
        if (self.length_target is None) != (self.length_penalty is None):
            raise ValueError("length_target and length_penalty need each other")
        return self

    @property
    def responses(self) -> int:
        """Responses of one rollout."""
        return self.prompts * self.samples_per_prompt

    @property
    def samples_per_prompt(self) -> int:
        """Responses to each prompt."""
        return 1

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
        return "prompt", "messages", "system", "tools"

    @property
    def text_roles(self) -> tuple[str, ...]:
        return "prompt", "messages", "system"

    @property
    def metric_names(self) -> tuple[str, ...]:
        labels = tuple(f"reward/{source.label}" for source in self.rewards) if len(self.rewards) > 1 else ()
        return "loss", "reward", *labels, "response_tokens", "without_eos", *(("kl",) if self.kl else ())
