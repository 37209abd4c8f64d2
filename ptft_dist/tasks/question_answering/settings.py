"""Settings of extractive question answering."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveInt

from ptft_dist.config.task_settings import TaskSettings


class QuestionAnsweringSettings(TaskSettings):
    """Settings of extractive question answering (Rajpurkar et al. 2016, SQuAD). Rows have `question`, `context` and
    `answers`: {text: [...], answer_start: [...]}, empty lists where the context has no answer."""

    evaluation_only = ("max_answer_length", "n_best", "no_answer_margin")
    after_prepare = ("max_answer_length", "n_best", "no_answer_margin")

    stride: Annotated[int, Field(ge=0)] = 64
    """A context longer than fits is read in pieces that share this many tokens."""
    max_answer_length: PositiveInt = 30
    """Tokens of a predicted answer at most."""
    n_best: PositiveInt = 20
    """Beginnings and ends that are combined to find the best answer."""
    no_answer_margin: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """`no answer` is predicted if its score is higher than the best answer's by more than this. Only where training
    rows without an answer teach it; else there is always one."""

    @property
    def roles(self) -> tuple[str, ...]:
        return "question", "context", "answers"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "cls", "sep", "mask", "pad"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "exact_match", "f1"
