"""Sections of the tasks that learn labels, numbers, tags and spans."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.section import BelowOne, Positive, Text, only_with
from ptft_dist.config.tasks.rows import TaskSection

ENTITY_MARKERS = ("[E1]", "[/E1]", "[E2]", "[/E2]")
TAG_LETTERS = {"iob2": "BI", "iob1": "BI", "bioes": "BIES"}
"""What tags of entities begin with, by scheme; beside them there is O."""


def inner_tag(scheme: str, tag: str) -> str:
    """The tag of a word's later pieces: inside the same entity."""
    return tag if scheme == "plain" or tag == "O" else "I" + tag[1:]


class LabelledText(TaskSection):
    """A text or a pair of texts, and what is to be predicted from it."""

    pair: bool = False
    """Each row has a second text, `text_pair`."""

    text_settings = ("pair", "entities")

    @property
    def roles(self) -> tuple[str, ...]:
        return ("text", "text_pair", "label") if self.pair else ("text", "label")

    @property
    def augmentable(self) -> bool:
        return True

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "cls", "sep", "mask", "pad"


class ClassificationSection(LabelledText):
    """Settings of the classification of texts, pairs of texts, or relations. Longer texts are cut and counted."""

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


class RegressionSection(LabelledText):
    """Settings of the prediction of a number from a text or a pair of texts. Longer texts are cut and counted."""

    after_prepare = ("loss",)

    loss: Literal["mse", "mae", "huber"] = "mse"
    """The mean squared, absolute, or Huber's error."""


class TokenClassificationSection(TaskSection):
    """Settings of a tag for each word. Rows have `tokens` and `tags`, lists of the same length, as .conll files give.

    A sentence longer than data.max_length is split at a word, not cut.
    """

    scheme: Literal["iob2", "iob1", "bioes", "plain"] = "iob2"
    """How tags spell entities: IOB2, IOB1, BIOES, or `plain`: each tag for itself, as for parts of speech."""
    labels: Annotated[tuple[Text, ...], Field(min_length=2)] | None = None
    """The tags in the order of their ids; when not given, those of the training rows, sorted."""
    pieces: Literal["first", "all"] = "first"
    """Which tokens of a word carry its tag in the loss. The first one's prediction is the word's. `all`: the later ones
    of a word in an entity carry I- of its type."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        labels = self.labels or ()
        if len(set(labels)) != len(labels):
            raise ValueError("labels: each tag may stand there once")
        for tag in labels if self.scheme != "plain" else ():
            letter, dash, kind = tag.partition("-")
            if tag != "O" and (letter not in TAG_LETTERS[self.scheme] or bool(dash) != bool(kind)):
                raise ValueError(f"labels: {tag!r} is no tag of the scheme {self.scheme}")
            if self.pieces == "all" and inner_tag(self.scheme, tag) not in labels:
                raise ValueError(f"labels: pieces: all needs {inner_tag(self.scheme, tag)} beside {tag}")
        return self

    @property
    def roles(self) -> tuple[str, ...]:
        return "tokens", "tags"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "cls", "sep", "mask", "pad"


class QuestionAnsweringSection(TaskSection):
    """Settings of extractive question answering (Rajpurkar et al. 2016, SQuAD). Rows have `question`, `context` and
    `answers`: {text: [...], answer_start: [...]}, empty lists where the context has no answer."""

    evaluation_only = ("max_answer_length", "n_best", "no_answer_margin")
    after_prepare = ("max_answer_length", "n_best", "no_answer_margin")

    stride: Annotated[int, Field(ge=0)] = 64
    """A context longer than fits is read in pieces that share this many tokens."""
    max_answer_length: PositiveInt = 30
    """Tokens of a predicted answer at most."""
    n_best: PositiveInt = 20
    """Beginnings and ends that are combined to find the best answer."""
    no_answer_margin: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """`no answer` is predicted if its score is higher than the best answer's by more than this. Only where training
    rows without an answer teach it; else there is always one."""

    @property
    def roles(self) -> tuple[str, ...]:
        return "question", "context", "answers"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "cls", "sep", "mask", "pad"
