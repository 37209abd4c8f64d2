"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from ptft_dist.config.section import Positive, only_with
from ptft_dist.tasks.common.chat_settings import ChatSettings
from ptft_dist.tasks.common.generation_settings import NO_SCORES, GenerationSettings


class SftSettings(ChatSettings):
    """Settings of supervised fine-tuning on conversations."""

    section = "sft"
    may_change = ("head", "generation")
    distillable = True
    writes = True
    after_prepare = ("neftune_alpha", "head", "generation")

    shape: Literal["auto", "messages", "sharegpt", "alpaca", "single_turn", "prompt_completion", "text"] = "auto"
    """The format of the rows. `messages`: role and content; `sharegpt`: conversations of from and value; `alpaca`:
    instruction, input, output; `single_turn`: two texts, prompt of the user and completion of the assistant;
    `prompt_completion`: two lists of messages, or two texts that are joined without the chat template; `text`: plain
    text. `auto`: from the columns of each file's first row, which all its rows must share; never `single_turn`."""
    loss: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens are trained on: all assistant turns, the last one only, or all tokens. A turn includes its end."""
    too_long: Literal["cut", "drop"] = "cut"
    """A conversation longer than data.max_length is truncated at its end (`cut`) or dropped; both are counted. One
    without a remaining assistant token is always dropped."""
    packing: bool = False
    """Pack as many conversations as fit into a row, to reduce padding. Attention stays within each conversation. A
    packed row counts as one row in batch.global_size."""
    neftune_alpha: Positive | None = None
    """NEFTune: noise on the embeddings in training (Jain et al. 2023); 5 is usual."""
    head: Literal["auto", "fused", "logits"] = "auto"
    """See clm.head."""
    generation: GenerationSettings | None = None
    """Generate the last answer of each conversation at evaluations, and score it."""

    @property
    def isolated(self) -> bool:
        return self.packing

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.generation is not None and self.packing:
            raise ValueError("generation needs rows of one conversation each: set packing: false")
        if self.generation is not None and self.shape == "text":
            raise ValueError("generation has no effect here: it needs rows with answers, and shape: text has none")
        only_with(self, ("system", "template"), self.shape != "text", "a shape with turns")
        return self

    def for_answers(self) -> Self | None:
        """With `loss: last`, a row whose last question does not fit is dropped; it would end with an earlier one."""
        changes = {"generation": self.generation or NO_SCORES, "packing": False, "loss": "last", "too_long": "cut"}
        return None if self.shape == "text" else self.model_copy(update=changes)

    @property
    def roles(self) -> tuple[str, ...]:
        return (
            "messages",
            "conversations",
            "instruction",
            "input",
            "output",
            "prompt",
            "completion",
            "text",
            "system",
            "tools",
        )

    @property
    def text_roles(self) -> tuple[str, ...]:
        return tuple(role for role in self.roles if role != "tools")

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "perplexity", *(self.generation.metric_names if self.generation else ())
