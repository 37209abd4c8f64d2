"""Settings of token classification."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ptft_dist.config.section import Number, Text
from ptft_dist.config.task_settings import TaskSettings
from ptft_dist.tasks.common.scores.entities import AVERAGES, score_names

TAG_LETTERS: dict[str, tuple[str, ...]] = {
    "iob2": ("B", "I"),
    "iob1": ("B", "I"),
    "bioes": ("B", "I", "E", "S"),
    "bmes": ("B", "M", "E", "S"),
    "bilou": ("B", "I", "L", "U"),
}
"""The prefixes of entity tags, by scheme: of the first word, of later ones, and in some schemes of the last word and of
an entity of one word. Every scheme also has O."""


def inner_tag(scheme: str, tag: str) -> str:
    """The tag of a word's tokens after the first: the I- tag of the same entity type, or M- in the scheme bmes."""
    return tag if scheme == "plain" or tag == "O" else TAG_LETTERS[scheme][1] + tag[1:]


class TokenClassificationSettings(TaskSettings):
    """Settings of token classification. Rows have `tokens` and `tags`: lists of the same length, such as .conll files
    contain. A sentence longer than data.max_length is split between words, not truncated."""

    scheme: Literal["iob2", "iob1", "bioes", "bmes", "bilou", "plain"] = "iob2"
    """The tagging scheme of entities: IOB2, IOB1, BIOES, BMES, BILOU; or `plain`: independent tags, as for parts of
    speech."""
    labels: Annotated[tuple[Text, ...], Field(min_length=2)] | None = None
    """The tags in the order of their ids. Default: the tags of the training rows, sorted."""
    label_names: dict[Number, Text] = {}
    """The names of tags that the data have as numbers, such as {0: O, 1: B-PER, 2: I-PER}, in the order of their ids.
    With `pieces: all`, missing I- tags follow. Default: the names in the features of the data set (ClassLabel), if it
    has any."""
    pieces: Literal["first", "all"] = "first"
    """Which tokens of a word are labelled: the first only, or all; with `all`, later tokens of an entity's word get its
    I- tag. The prediction for the first token is that of the word."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        labels = self.labels or ()
        if len(set(labels)) != len(labels):
            raise ValueError("labels: a tag is listed twice")
        if labels and (unlisted := [name for name in self.label_names.values() if name not in labels]):
            raise ValueError(f"label_names: {unlisted[0]!r} is not in labels")
        for tag in labels if self.scheme != "plain" else ():
            prefix, dash, entity_type = tag.partition("-")
            if tag != "O" and (prefix not in TAG_LETTERS[self.scheme] or bool(dash) != bool(entity_type)):
                raise ValueError(f"labels: {tag!r} is not a tag of the scheme {self.scheme}")
            if self.pieces == "all" and inner_tag(self.scheme, tag) not in labels:
                raise ValueError(f"labels: pieces: all needs the tag {inner_tag(self.scheme, tag)}, because of {tag}")
        return self

    @property
    def roles(self) -> tuple[str, ...]:
        return "tokens", "tags"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return "cls", "sep", "mask", "pad"

    @property
    def text_roles(self) -> tuple[str, ...]:
        return ("tokens",)

    @property
    def fixed_texts(self) -> str | None:
        return "its tags belong to words"

    @property
    def metric_names(self) -> tuple[str, ...]:
        averages = AVERAGES[1:] if self.scheme == "plain" else AVERAGES
        return "loss", "accuracy", *(name for average in averages for name in score_names(average))
