"""Settings of extractive question answering."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import Field, PositiveInt

from ptft_dist.config.task_settings import TaskSettings


class QuestionAnsweringSettings(TaskSettings):
    """Settings of extractive question answering (Rajpurkar et al. 2016, SQuAD). Rows have `question`, `context` and
    `answers`: {text: [...], answer_start: [...]}, empty lists where the context has no answer."""

    may_change = ("max_answer_length", "n_best", "no_answer_margin")
    evaluation_only = ("max_answer_length", "n_best", "no_answer_margin")
    after_prepare = ("max_answer_length", "n_best", "no_answer_margin")

    stride: Annotated[int, Field(ge=0)] = 64
    """A long context is split into windows that overlap by this many tokens. Answers split by every window are not
    learned."""
    max_answer_length: PositiveInt = 30
    """Maximum number of tokens in a predicted answer."""
    n_best: PositiveInt = 20
    """Number of best start and end positions that are combined to find the best answer."""
    no_answer_margin: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Predict no answer if its score exceeds that of the best answer by more than this. Needs training rows without an
    answer."""

    def length_problems(self, max_length: int) -> Iterator[tuple[str, str]]:
        if self.stride >= max_length:
            yield (
                "stride",
                f"{self.stride} leaves no room for a context in rows of data.max_length ({max_length}); lower it, or "
                "raise data.max_length",
            )

    @property
    def roles(self) -> tuple[str, ...]:
        return "question", "context", "answers"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "cls", "sep", "mask", "pad"

    @property
    def text_roles(self) -> tuple[str, ...]:
        return "question", "context"

    @property
    def fixed_texts(self) -> str | None:
        return "its answers are positions in the context"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "exact_match", "f1"
