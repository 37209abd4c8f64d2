"""Settings of masked language modelling with next-sentence prediction."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ptft_dist.config.section import Fraction
from ptft_dist.tasks.common.masking_settings import Masking


class MlmNspSettings(Masking):
    """Settings of BERT's pretraining: masked tokens, and whether the second segment follows the first.

    A row is [CLS] A [SEP] B [SEP]; half of the time B goes on where A ends, else it is from another document.
    """

    after_prepare = ("probability", "mask_share", "random_share", "unit", "span_length")
    draws = True

    packing: Literal[False] = False
    """A row holds one pair."""
    sentence: Literal["line", "punctuation"] = "punctuation"
    """What a sentence is: a line, or what ends with a full stop, question or exclamation mark or a line."""
    short_probability: Fraction = 0.1
    """The share of pairs that aim at a random shorter length, so that short inputs are known too."""
    duplicates: Annotated[int, Field(ge=1)] = 1
    """Pairs are drawn this many times from each document (BERT's dupe_factor)."""

    @property
    def _name(self) -> str:
        return "mlm_nsp"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "perplexity"
