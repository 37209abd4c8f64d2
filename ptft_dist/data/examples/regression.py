"""Rows with a text or a pair of texts, and a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.examples.encoder import Example, RowError, require
from ptft_dist.data.examples.labelled_text import LabelledTextRows
from ptft_dist.data.formats import Record, json_type

if TYPE_CHECKING:
    from tokenizers import Encoding


class RegressionRows(LabelledTextRows):
    """Columns: input_ids, token_type_ids, and labels: one number."""

    columns = {**LabelledTextRows.columns, "labels": "<f4"}

    @classmethod
    def check(cls, recipe: Recipe, record: Record) -> None:
        super().check(recipe, record)
        number(record)

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        columns, notes = self.text_columns(encodings[0])
        label = number(record)
        return [Example({**columns, "labels": label}, {"text": record.values["text"], "label": label}, notes)]


def number(record: Record) -> float:
    """
    Raises:
        RowError: the label is not a finite number.
    """
    label = require(record.values, "label")
    if isinstance(label, bool) or not isinstance(label, int | float | str):
        raise RowError(f"the label is {json_type(label)} and not a number. Correct or remove the row.")
    try:
        value = float(label)
    except ValueError:
        raise RowError(f"the label {label!r} is not a number. Correct or remove the row.") from None
    if not math.isfinite(value):
        raise RowError(f"the label is {value}, which is not a finite number. Correct or remove the row.")
    return value
