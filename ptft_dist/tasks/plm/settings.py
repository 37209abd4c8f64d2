"""Settings of permuted language modelling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from ptft_dist.config.task_settings import DocumentSettings


class PlmSettings(DocumentSettings):
    """Settings of permuted language modelling (Yang et al. 2019, XLNet). Documents end with EOS."""

    like_inputs = False  # XLNet's tokenizer adds SEP and CLS for fine-tuning; in pretraining, documents end with EOS

    attention: Literal["across"] | None = None
    """XLNet cannot restrict attention to the documents of a packed row."""
    mask_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 1 / 6
    """The fraction of tokens to predict, in spans: the paper's 1/K."""
    longest_span: Annotated[int, Field(ge=1)] = 5
    """Span lengths are uniform from 1 to this."""

    @property
    def isolated(self) -> bool:
        return False

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "eos", "cls", "sep", "mask", "pad"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "perplexity", "accuracy"
