"""Settings of classification."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ptft_dist.config.section import BelowOne, Positive, Text, only_with
from ptft_dist.tasks.common.labelled_text_settings import LabelledText

ENTITY_MARKERS = ("[E1]", "[/E1]", "[E2]", "[/E2]")


class ClassificationSettings(LabelledText):
    """Settings of the classification of texts, pairs of texts, or relations. Longer texts are cut and counted."""

    distillable = True
    after_prepare = ("class_weights", "label_smoothing")

    labels: Annotated[tuple[Text, ...], Field(min_length=2)] | None = None
    """The labels in the order of their ids; when not given, those of the training rows, sorted."""
    multi_label: bool = False
    """A row has any number of labels (a list) instead of exactly one."""
    class_weights: Literal["balanced"] | dict[Text, Positive] | None = None
    """Weights of the labels in the loss: by name, or `balanced`, the inverse of their frequency in the training rows.
    The loss is then averaged over the weights of the rows' labels (PyTorch's cross_entropy with `weight`). With
    multi_label a weight is that of the label's yes, `balanced`: rows without it / rows with it, and the average stays
    that over all yes-or-no decisions (PyTorch's binary cross-entropy with `pos_weight`)."""
    label_smoothing: BelowOne = 0.0
    """This share of the target probability is spread evenly over the labels (Szegedy et al. 2016)."""
    entities: bool = False
    """Classify the relation between two spans of the text, `head` and `tail`: [start, end) in characters. They are
    marked with [E1] [/E1] and [E2] [/E2] (Baldini Soares et al. 2019)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        only_with(self, ("label_smoothing",), not self.multi_label, "rows with one label each")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: each label may stand there once")
        if isinstance(self.class_weights, dict) and self.labels is not None:
            strange = sorted(set(self.class_weights) ^ set(self.labels))
            if strange:
                raise ValueError(f"class_weights and labels do not name the same labels: {', '.join(strange)}")
        if self.entities and self.pair:
            raise ValueError("entities and pair exclude each other")
        return self

    @property
    def roles(self) -> tuple[str, ...]:
        return ("text", "label", "head", "tail") if self.entities else super().roles

    @property
    def augmentable(self) -> bool:
        return not self.entities  # the spans would move

    @property
    def added_tokens(self) -> tuple[str, ...]:
        return ENTITY_MARKERS if self.entities else ()

    @property
    def metric_names(self) -> tuple[str, ...]:
        averages = ("micro", "macro", "weighted") if self.multi_label else ("macro", "weighted")
        scores = [f"{score}_{average}" for average in averages for score in ("precision", "recall", "f1")]
        return "loss", "accuracy", *scores, *(() if self.multi_label else ("mcc",))
