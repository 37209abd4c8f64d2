"""Settings of causal language modelling."""

from __future__ import annotations

from typing import Literal

from ptft_dist.config.task_settings import DocumentSettings


class ClmSettings(DocumentSettings):
    """Settings of causal language modelling."""

    may_change = ("head",)
    distillable = True
    writes = True

    bos: bool = False
    """Begin each document with the BOS token. Every document ends with EOS."""
    head: Literal["auto", "fused", "logits"] = "auto"
    """`fused`: compute the loss in tiles, without [batch, length, vocabulary] logits in memory. `logits`: compute all
    logits. `auto`: fused on an accelerator, logits on a CPU, where they are faster."""

    @property
    def boundaries(self) -> tuple[str | None, str]:
        return "bos" if self.bos else None, "eos"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "perplexity"
