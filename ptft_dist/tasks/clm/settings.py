"""Settings of causal language modelling."""

from __future__ import annotations

from typing import Literal

from ptft_dist.config.task_settings import DocumentSettings


class ClmSettings(DocumentSettings):
    """Settings of causal language modelling."""

    may_change = ("head",)
    only_rows = ("bos",)
    distillable = True
    writes = True

    bos: bool | Literal["auto"] = "auto"
    """Begin each document with the BOS token. `auto`: begin it with BOS if the tokenizer itself begins a text with BOS,
    as those of Llama, Gemma and Mistral do. Every document ends with EOS."""
    head: Literal["auto", "fused", "logits"] = "auto"
    """`fused`: compute the loss in tiles, without [batch, length, vocabulary] logits in memory. `logits`: compute all
    logits. `auto`: fused on an accelerator, logits on a CPU, where they are faster, and where an adapter changes the
    output head."""

    def boundaries(self, *, adds_bos: bool) -> tuple[str | None, str]:
        begins = adds_bos if self.bos == "auto" else self.bos
        return "bos" if begins else None, "eos"

    @property
    def metric_names(self) -> tuple[str, ...]:
        return "loss", "perplexity"
