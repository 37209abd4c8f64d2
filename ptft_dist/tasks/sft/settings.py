"""Settings of supervised fine-tuning."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from ptft_dist.config.section import Positive, Text, only_with
from ptft_dist.config.task_settings import TaskSettings
from ptft_dist.tasks.common.generation_settings import GenerationSettings

CHATML = ("<|im_start|>", "<|im_end|>")


class SftSettings(TaskSettings):
    """Settings of supervised fine-tuning on conversations."""

    distillable = True
    writes = True
    after_prepare = ("neftune_alpha", "head", "generation")
    text_settings = ("shape", "system")

    shape: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"] = "auto"
    """How rows look. `messages`: role and content; `sharegpt`: conversations of from and value; `alpaca`: instruction,
    input, output; `prompt_completion`: two texts, or two lists of messages; `text`: nothing but text. `auto`: by the
    columns of each file's first row, which all its rows must share."""
    template: Text | None = None
    """The chat template: a name that TRL knows (chatml, llama3, qwen3, ...), or a Jinja file. When not given: the
    tokenizer's own, and `chatml` for a tokenizer that is learned here."""
    system: Text | None = None
    """A system message for conversations that have none."""
    loss: Literal["assistant", "last", "all"] = "assistant"
    """What is learned: the assistant's turns, the last of them only, or everything. The end of a turn belongs to it."""
    too_long: Literal["cut", "drop"] = "cut"
    """A conversation longer than data.max_length loses its end, or is left out; both are counted. One whose answers
    would be cut away entirely is always left out."""
    packing: bool = False
    """Put several conversations into a row, as many as fit, so that little is padded. They do not see each other. A
    row counts as one in batch.global_size."""
    neftune_alpha: Positive | None = None
    """Noise on the embeddings in training (Jain et al. 2023, NEFTune); 5 is usual."""
    head: Literal["auto", "fused", "logits"] = "auto"
    """As clm.head."""
    generation: GenerationSettings | None = None
    """At evaluations, write the last answer of each conversation and compare."""

    @property
    def isolated(self) -> bool:
        return self.packing

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.generation is not None and self.packing:
            raise ValueError("generation needs rows of one conversation each: packing: false")
        if self.generation is not None and self.shape == "text":
            raise ValueError("generation has no effect here: it needs rows with answers, and shape: text has none")
        only_with(self, ("system", "template"), self.shape != "text", "a shape with turns")
        return self

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
    def special_tokens(self) -> tuple[str, ...]:
        return f"eos={CHATML[1]}", "bos", "pad"

    @property
    def extra_special_tokens(self) -> tuple[str, ...]:
        return CHATML[:1]

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "perplexity", *(self.generation.metric_names if self.generation else ())
