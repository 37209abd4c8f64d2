"""Settings of causal language modelling."""

from __future__ import annotations

from typing import Literal

from ptft_dist.config.task_settings import DocumentSettings


class ClmSettings(DocumentSettings):
    """Settings of causal language modelling."""

    distillable = True
    writes = True

    bos: bool = False
    """Begin each document with the tokenizer's BOS token. It always ends with EOS."""
    head: Literal["auto", "fused", "logits"] = "auto"
    """`fused`: the loss is computed tile by tile and the [batch, length, vocabulary] logits are never held; `logits`:
    they are. `auto`: fused on an accelerator, logits on a CPU, where they are faster."""

    @property
    def boundaries(self) -> tuple[str | None, str]:
        return "bos" if self.bos else None, "eos"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "perplexity"
