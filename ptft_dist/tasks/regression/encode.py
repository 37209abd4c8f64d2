"""Encodes rows with a text or a pair of texts, and a number."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptft_dist.data.encoder import Example, RowError
from ptft_dist.data.formats import Record, json_type
from ptft_dist.data.row_encoder import require
from ptft_dist.tasks.common.labelled_text_rows import LabelledTextRows
from ptft_dist.tasks.common.labelled_text_settings import LabelledText

if TYPE_CHECKING:
    from tokenizers import Encoding

_LARGEST = 3.4e38  # of fp32, rounded down


class RegressionRows(LabelledTextRows):
    """Encodes texts with a number. Columns: input_ids, token_type_ids, and labels: one fp32 number."""

    columns = {**LabelledTextRows.columns, "labels": "<f4"}

    answer_roles = ("label",)

    @classmethod
    def unanswered(
        cls,
        settings: LabelledText,  # noqa: ARG003
        survey: Mapping[str, Any],  # noqa: ARG003
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {**values, "label": 0.0}

    @classmethod
    def check(cls, settings: LabelledText, record: Record) -> None:
        super().check(settings, record)
        number(record)

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        columns, notes = self.text_columns(encodings[0])
        label = number(record)
        return [Example({**columns, "labels": label}, {"text": record.values["text"], "label": label}, notes)]


def number(record: Record) -> float:
    """The label of a row as a number.

    Raises:
        RowError: it is missing, not a number, not finite or too large for fp32.
    """
    label = require(record.values, "label")
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        raise RowError(f"the label is {json_type(label)} and not a number. Correct or remove the row.")
    try:
        value = float(label)
    except ValueError:
        raise RowError(f"the label {label!r} is not a number. Correct or remove the row.") from None
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise RowError(f"the label is {value}, which is not a finite number. Correct or remove the row.")
    if abs(value) > _LARGEST:
        raise RowError(f"the label {value} is too large for fp32. Scale the labels, or correct the row.")
    return value
