"""Settings of text-to-text learning."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ptft_dist.config.section import BelowOne
from ptft_dist.config.task_settings import TaskSettings
from ptft_dist.tasks.common.generation_settings import GenerationSettings


class Seq2SeqSettings(TaskSettings):
    """Settings of text-to-text learning with an encoder and a decoder."""

    writes = True
    after_prepare = ("label_smoothing", "generation")
    text_settings = ("prefix",)

    prefix: str = ""
    """Stands before every source text, such as "translate English to German: "."""
    max_target_length: Annotated[int, Field(ge=2)] = 128
    """Tokens of a target at most, EOS included; data.max_length is the source's. What is longer is cut and counted."""
    label_smoothing: BelowOne = 0.0
    """This share of the target probability is spread evenly over the vocabulary (Szegedy et al. 2016)."""
    generation: GenerationSettings | None = None
    """Write and score translations or summaries at evaluations."""

    @property
    def roles(self) -> tuple[str, ...]:
        return "source", "target"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "eos", "pad"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "perplexity", "accuracy", *(self.generation.metric_names if self.generation else ())
