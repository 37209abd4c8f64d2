"""Settings of classification."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ptft_dist.config.section import BelowOne, Number, Positive, Text, only_with
from ptft_dist.tasks.common.labelled_text_settings import LabelledText

ENTITY_MARKERS = ("[E1]", "[/E1]", "[E2]", "[/E2]")


class ClassificationSettings(LabelledText):
    """Settings of the classification of texts, pairs of texts, or relations. Longer texts are truncated and counted."""

    distillable = True
    after_prepare = ("class_weights", "label_smoothing")
    not_likelihood = after_prepare

    labels: Annotated[tuple[Text, ...], Field(min_length=2)] | None = None
    """The labels in the order of their ids. Default: the labels of the training rows, sorted."""
    label_names: dict[Number, Text] = {}
    """The names of labels that the data have as numbers, such as {0: negative, 1: positive}, in the order of their ids.
    Default: the names in the features of the data set (ClassLabel), if it has any."""
    multi_label: bool = False
    """Multi-label classification: a row has a list of any number of labels."""
    class_weights: Literal["balanced"] | dict[Text, Positive] | None = None
    """Weights of the labels in the loss: by name, or `balanced`, inversely proportional to their frequency in the
    training rows. The loss is a weighted mean, as PyTorch's cross_entropy with `weight`. With multi_label these are the
    weights of positive labels, as `pos_weight` of PyTorch's binary cross-entropy; `balanced`: negatives / positives."""
    label_smoothing: BelowOne = 0.0
    """Label smoothing: this fraction of the target probability is uniform over the labels (Szegedy et al. 2016)."""
    entities: bool = False
    """Relation classification: rows have two spans of the text, `head` and `tail`, as [start, end) in characters. They
    are marked with [E1] [/E1] and [E2] [/E2] (Baldini Soares et al. 2019)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        only_with(self, ("label_smoothing",), not self.multi_label, "rows with one label each")
        if self.labels is not None and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: a label is listed twice")
        if self.labels is not None and (unlisted := [n for n in self.label_names.values() if n not in self.labels]):
            raise ValueError(f"label_names: {unlisted[0]!r} is not in labels")
        if isinstance(self.class_weights, dict) and self.labels is not None:
            different = sorted(set(self.class_weights) ^ set(self.labels))
            if different:
                raise ValueError(
                    f"class_weights and labels must have the same labels; only one of them has: {', '.join(different)}"
                )
        if self.entities and self.pair:
            raise ValueError("entities and pair cannot be used together")
        return self

    @property
    def roles(self) -> tuple[str, ...]:
        return ("text", "label", "head", "tail") if self.entities else super().roles

    @property
    def compared_roles(self) -> tuple[str, ...]:
        return ("head", "tail") if self.entities else ()

    @property
    def fixed_texts(self) -> str | None:
        return "its entities are positions in the text" if self.entities else None

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
