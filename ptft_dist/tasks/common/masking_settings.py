"""Settings of masking, shared by masked language modelling with and without next-sentence prediction."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ptft_dist.config.section import Fraction, only_with
from ptft_dist.config.task_settings import DocumentSettings


class Masking(DocumentSettings):
    """Settings of masking (Devlin et al. 2019)."""

    probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """The fraction of tokens to predict. Special tokens are never predicted."""
    mask_share: Fraction = 0.8
    """Of those, the fraction replaced by [MASK]."""
    random_share: Fraction = 0.1
    """Of those, the fraction replaced by a random token; the rest is unchanged."""
    unit: Literal["token", "word", "span"] = "token"
    """The unit of masking: tokens, whole words, or spans of tokens (Joshi et al. 2020, SpanBERT)."""
    span_length: Annotated[float, Field(ge=1.0)] | None = None
    """`span`: mean of the geometric distribution of span lengths, which is cut off at 10 tokens. Default: 5."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        only_with(self, ("span_length",), self.unit == "span", f"{self._name}.unit: span")
        if self.mask_share + self.random_share > 1:
            raise ValueError(f"mask_share + random_share is {self.mask_share + self.random_share:g}, more than 1")
        return self

    @property
    def _name(self) -> str:
        return "mlm"

    def boundaries(self, *, adds_bos: bool) -> tuple[str | None, str]:  # noqa: ARG002
        return "cls", "sep"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "cls", "sep", "mask", "pad"
