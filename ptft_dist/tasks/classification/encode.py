"""Encodes rows with a text, a pair of texts or a text with two entity spans, and a label or a list of labels."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptft_dist.data.encoder import EncoderContext, Example, LeftOut, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.row_encoder import require, require_list, require_text
from ptft_dist.errors import DataError
from ptft_dist.tasks.classification.settings import ENTITY_MARKERS, ClassificationSettings
from ptft_dist.tasks.common.label_names import LabelNames, check_known, class_name, in_order, label_name
from ptft_dist.tasks.common.labelled_text_rows import LabelledTextRows

if TYPE_CHECKING:
    from tokenizers import Encoding

LABELS, LABEL_NAMES = "classification.labels", "classification.label_names"
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?", re.ASCII)


class ClassificationRows(LabelledTextRows):
    """Encodes labelled texts. Columns: input_ids, token_type_ids, and labels: one id; with multi_label any number."""

    surveys = True
    answer_roles = ("label",)
    columns = {**LabelledTextRows.columns, "labels": "<i4"}

    settings: ClassificationSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        labels = self.survey["labels"]
        self.survey |= {"frequencies": [0] * len(labels), "rows": 0}
        self.ids = {label: i for i, label in enumerate(labels)}
        self.markers = [self.tokenizer.convert_tokens_to_ids(marker) for marker in ENTITY_MARKERS]

    @classmethod
    def check(cls, settings: ClassificationSettings, record: Record) -> None:  # type: ignore[override]
        super().check(settings, record)
        names = label_names(settings, record)
        if settings.labels:
            check_known(names, settings.labels, LABELS)
        if settings.entities:
            _marked(record)

    @classmethod
    def survey_of(
        cls,
        settings: ClassificationSettings,
        records: Iterable[Record],
        seed: int,  # noqa: ARG003
    ) -> dict[str, Any]:
        """The names of the labels in the order of their ids, as `labels`.

        `count` later adds `rows`, the number of training examples, and `frequencies`, the number of them with each
        label. Both include augmented copies and exclude dropped rows.
        """
        seen = LabelNames("label", LABELS)
        for record in records:
            value = record.values["label"]
            seen.add(label_names(settings, record), record.where, value if isinstance(value, list) else [value])
        if not settings.labels:
            seen.check_distinct()
        in_data = in_order(seen.first, settings.label_names, seen.ids)
        labels = list(settings.labels or in_data or sorted(seen.first, key=_numbers_first))
        if len(labels) < 2:
            raise DataError(
                f"data: the training rows have the labels {', '.join(labels) or '(none)'}; a classifier needs two or "
                "more. Correct the label column, or name the right one with fields: {label: ...}."
            )
        return {"labels": labels}

    @classmethod
    def unanswered(
        cls, settings: ClassificationSettings, survey: Mapping[str, Any], values: Mapping[str, Any]
    ) -> dict[str, Any]:
        return {**values, "label": [] if settings.multi_label else survey["labels"][0]}

    def pieces(self, record: Record) -> Sequence[Any]:
        return [_marked(record)] if self.settings.entities else super().pieces(record)

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        columns, notes = self.text_columns(encodings[0])
        names = label_names(self.settings, record)
        check_known(names, self.ids, LABEL_NAMES if self.settings.label_names else LABELS)
        if self.settings.entities and not set(self.markers) <= set(columns["input_ids"]):
            raise LeftOut("with an entity beyond data.max_length")
        labels = [self.ids[name] for name in names]
        return [Example({**columns, "labels": labels}, {"text": record.values["text"], "label": names}, notes)]

    def count(self, example: Example) -> None:
        self.survey["rows"] += 1
        for label in example.columns["labels"]:
            self.survey["frequencies"][label] += 1


def label_names(settings: ClassificationSettings, record: Record) -> list[str]:
    """The names of a row's labels. Numbers without a name and booleans are converted to text, such as `3` or `true`.

    Raises:
        RowError: the label is missing, invalid or listed twice.
    """
    if not settings.multi_label:
        return [_name(settings, require(record.values, "label"))]
    names = [_name(settings, label) for label in require_list(record.values, "label")]
    if len(set(names)) != len(names):
        raise RowError(f"a label is listed twice: {names}. Remove one.")
    return names


def _name(settings: ClassificationSettings, label: Any) -> str:
    return label_name(class_name(label, settings.label_names))


def _numbers_first(label: str) -> tuple[int, float, str]:
    """Sort key: numbers by value, then texts alphabetically."""
    number = _NUMBER.fullmatch(label)
    return (0, float(label), label) if number else (1, 0.0, label)


def _marked(record: Record) -> str:
    """The text with entity markers around the spans `head` and `tail` (Baldini Soares et al. 2019).

    Raises:
        RowError: a span lies outside of the text, the spans overlap, or the text already contains a marker.
    """
    text = require_text(record.values, "text")
    if present := [marker for marker in ENTITY_MARKERS if marker in text]:
        raise RowError(f"the text contains the entity marker {present[0]!r}. Remove it.")
    spans = []
    for role in ("head", "tail"):
        span = require_list(record.values, role)
        if len(span) != 2 or not all(isinstance(x, int) and not isinstance(x, bool) for x in span):
            raise RowError(f"the field {role!r} is not [start, end) in characters, two whole numbers: {span}")
        if not 0 <= span[0] < span[1] <= len(text):
            raise RowError(f"{role}: {span} is not a span of the text, which has {len(text)} characters")
        spans.append(span)
    (a, b), (c, d) = spans
    if max(a, c) < min(b, d):
        raise RowError(f"head {spans[0]} and tail {spans[1]} overlap")
    # If one span ends where the other starts, the end marker comes first.
    first, first_end, second, second_end = ENTITY_MARKERS
    inserts = [(a, 1, first), (b, 0, first_end), (c, 1, second), (d, 0, second_end)]
    for position, _, marker in sorted(inserts, reverse=True):
        text = text[:position] + marker + text[position:]
    return text
