"""Settings of span corruption."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ptft_dist.config.task_settings import DocumentSettings


class SpanCorruptionSettings(DocumentSettings):
    """Settings of T5's span corruption (Raffel et al. 2020): spans are replaced by sentinels and predicted."""

    only_with_trained_tokenizer = ("sentinels",)

    attention: Literal["across"] | None = None
    """Tokens attend to the other documents of a packed row, as in T5's pretraining."""
    density: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """The fraction of tokens that are masked."""
    mean_span: Annotated[float, Field(ge=1.0)] = 3.0
    """The mean length of a masked span, in tokens."""
    sentinels: Annotated[int, Field(ge=1, le=1000)] = 100
    """Number of sentinels (<extra_id_0> and so on) of a tokenizer that is trained here."""

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
