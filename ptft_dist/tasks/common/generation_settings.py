"""Settings of generation at evaluations."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.section import Section, only_with

ROUGE = ("rouge1", "rouge2", "rougeL")


class GenerationSettings(Section):
    """Generate texts at every evaluation, and score them against the references."""

    max_new_tokens: PositiveInt = 64
    """Maximum number of generated tokens."""
    num_beams: PositiveInt = 1
    """1: greedy decoding; more: beam search."""
    metrics: tuple[Literal["exact_match", "bleu", "chrf", "rouge"], ...] = ("exact_match", "bleu", "chrf", "rouge")
    """`bleu`, `chrf`: by sacrebleu, 0 to 100. `rouge`: F1 of ROUGE-1, -2, -L, 0 to 1. `exact_match`: a fraction."""
    bleu_tokenize: Literal["13a", "zh", "char", "intl", "none"] | None = None
    """sacrebleu's tokenizer. Default: 13a. Use zh for Chinese."""
    show: Annotated[int, Field(ge=0)] = 5
    """Number of texts written to run_dir/samples.jsonl at each evaluation."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        only_with(self, ("bleu_tokenize",), "bleu" in self.metrics, "bleu among the metrics")
        if not self.metrics and not self.show:
            raise ValueError("generation has no effect here: there are no metrics, and show is 0")
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The keys of `scores.text.text_scores`."""
        return tuple(name for metric in self.metrics for name in (ROUGE if metric == "rouge" else (metric,)))


NO_SCORES = GenerationSettings(metrics=())
"""Texts without references to compare them with."""
