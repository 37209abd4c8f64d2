"""Settings of span corruption."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ptft_dist.config.task_settings import DocumentSettings


class SpanCorruptionSettings(DocumentSettings):
    """Settings of T5's denoising (Raffel et al. 2020): spans become sentinels, and are to be written after them."""

    attention: Literal["across"] | None = None
    """The documents of a packed row see each other, as in T5's own pretraining."""
    density: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """The share of tokens that are hidden."""
    mean_span: Annotated[float, Field(ge=1.0)] = 3.0
    """The mean length of a hidden span."""
    sentinels: Annotated[int, Field(ge=1, le=1000)] = 100
    """How many sentinels (<extra_id_0> and so on) a tokenizer that is learned here gets."""

    @property
    def isolated(self) -> bool:
        return False

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "eos", "pad", "unk"

    @property
    def extra_special_tokens(self) -> tuple[str, ...]:
        return tuple(f"<extra_id_{i}>" for i in range(self.sentinels))

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "perplexity", "accuracy"
