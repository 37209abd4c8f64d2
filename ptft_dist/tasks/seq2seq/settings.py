"""Settings of sequence-to-sequence learning."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field

from ptft_dist.config.section import BelowOne, Text
from ptft_dist.config.task_settings import TaskSettings
from ptft_dist.tasks.common.generation_settings import NO_SCORES, GenerationSettings


class Seq2SeqSettings(TaskSettings):
    """Settings of sequence-to-sequence learning with an encoder-decoder network, such as translation."""

    may_change = ("generation",)
    writes = True
    after_prepare = ("label_smoothing", "generation")
    not_likelihood = ("label_smoothing",)
    text_settings = ("prefix",)

    prefix: str = ""
    """Text before every source, such as "translate English to German: "."""
    source_language: Text | None = None
    """The language of the sources, for tokenizers that mark texts with it: a token such as eng_Latn (NLLB) or en_XX
    (mBART)."""
    target_language: Text | None = None
    """The language of the targets, for such tokenizers."""
    max_target_length: Annotated[int, Field(ge=2)] = 128
    """Maximum tokens of a target, EOS included; data.max_length is that of a source. Longer texts are truncated."""
    label_smoothing: BelowOne = 0.0
    """Label smoothing: this fraction of the target probability is uniform over the vocabulary (Szegedy et al. 2016)."""
    generation: GenerationSettings | None = None
    """Generate and score texts at evaluations."""

    def for_answers(self) -> Self:
        return self.model_copy(update={"generation": self.generation or NO_SCORES})

    @property
    def roles(self) -> tuple[str, ...]:
        return "source", "target"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "eos", "pad"

    @property
    def linked_texts(self) -> str | None:
        return "a target belongs to its whole source"

    @property
    def text_roles(self) -> tuple[str, ...]:
        return "source", "target"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "perplexity", "accuracy", *(self.generation.metric_names if self.generation else ())
