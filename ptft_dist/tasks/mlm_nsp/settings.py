"""Settings of masked language modelling with next-sentence prediction."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ptft_dist.config.section import Fraction
from ptft_dist.tasks.common.masking_settings import Masking


class MlmNspSettings(Masking):
    """Settings of BERT's pretraining: masked language modelling and next-sentence prediction (Devlin et al. 2019).

    A row is [CLS] A [SEP] B [SEP]; in half of the pairs B follows A, in the others it is from another document.
    """

    after_prepare = ("probability", "mask_share", "random_share", "unit", "span_length")
    draws = True

    packing: Literal[False] = False
    """A row is one pair."""
    sentence: Literal["line", "punctuation"] = "punctuation"
    """Sentences end at a line end (`line`), or also at a full stop, question or exclamation mark (`punctuation`)."""
    short_probability: Fraction = 0.1
    """The fraction of pairs with a random shorter target length, as in BERT."""
    duplicates: Annotated[int, Field(ge=1)] = 1
    """How many times pairs are drawn from each document (BERT's dupe_factor)."""

    @property
    def _name(self) -> str:
        return "mlm_nsp"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "mlm_loss", "nsp_loss", "mlm_accuracy", "nsp_accuracy", "perplexity"
