"""Settings of prompting."""

from __future__ import annotations

import string
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, NonNegativeInt, model_validator

from ptft_dist.config.section import Text, only_with
from ptft_dist.config.task_settings import TaskSettings
from ptft_dist.tasks.common.generation_settings import GenerationSettings


def _text_keys(value: Any) -> Any:
    """YAML reads the label 0 as a number."""
    if not isinstance(value, dict):
        return value
    return {str(key) if isinstance(key, int) and not isinstance(key, bool) else key: x for key, x in value.items()}


class PromptingSettings(TaskSettings):
    """Settings of zero-shot and few-shot prompting of a causal network. The task is evaluated only."""

    trains: ClassVar[bool] = False
    draws: ClassVar[bool] = True
    after_prepare = ("normalize", "calibrate", "generation")

    template: Text = "{text}"
    """The prompt of a row: a text with columns in braces, such as `Review: {text} Sentiment:`. A brace of the text
    itself is doubled."""
    labels: Annotated[dict[Text, Text], BeforeValidator(_text_keys), Field(min_length=2)] | None = None
    """Classification: each label with the text that answers the prompt, such as {negative: " negative"}. The most
    likely one is the answer. Default: free generation, scored against the column `target`."""
    shots: NonNegativeInt = 0
    """Examples before the row: training rows with their answers, chosen by a hash of train.seed and row, and balanced
    over the labels."""
    separator: Text = "\n\n"
    """The text between examples. It also ends a generated text."""
    normalize: Literal["none", "tokens", "bytes"] = "none"
    """Divide the log-likelihood of a label by the number of its tokens or bytes (`bytes`: acc_bytes of lm-eval)."""
    calibrate: Text | None = None
    """Contextual calibration (Zhao et al. 2021): subtract the log-likelihoods of the labels after a prompt whose
    columns are all this text, such as N/A."""
    chat: bool = False
    """Render prompts with the tokenizer's chat template: a user's message for each prompt, an assistant's for each
    answer."""
    generation: GenerationSettings = GenerationSettings()
    """Free generation: length and metrics."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        only_with(self, ("normalize", "calibrate"), self.labels is not None, "labels")
        only_with(self, ("generation",), self.labels is None, "free generation, without labels")
        only_with(self, ("separator",), not self.chat, "chat: false, because the chat template separates examples")
        if self.labels is not None and len(set(self.labels.values())) < len(self.labels):
            raise ValueError("labels: two labels have the same text; give each its own")
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise ValueError(f"template: {error}; double a brace that is part of the text") from None
        for _, name, form, conversion in parts:
            if name is not None and (not name or form or conversion or set(name) & set(".[]")):
                raise ValueError(f"template: {{{name}}} is no column; write the name of one, and double other braces")
        if not self.columns:
            raise ValueError("template: it has no column, so all rows have the same prompt; add one, such as {text}")
        if self.answer_role in self.columns:
            raise ValueError(f"template: {{{self.answer_role}}} is the answer; remove it")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns in the template."""
        return tuple(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(self.template) if name))

    @property
    def answer_role(self) -> str:
        return "target" if self.labels is None else "label"

    @property
    def roles(self) -> tuple[str, ...]:
        return *self.columns, self.answer_role

    @property
    def head(self) -> str:
        """How the loss is computed, see NextTokenTask: from logits."""
        return "logits"

    @property
    def text_roles(self) -> tuple[str, ...]:
        return self.columns

    @property
    def metric_names(self) -> tuple[str, ...]:
        if self.labels is None:
            return "loss", "perplexity", *self.generation.metric_names
        scores = [f"{score}_{average}" for average in ("macro", "weighted") for score in ("precision", "recall", "f1")]
        return "loss", "accuracy", *scores, "mcc"
