"""Tables that are shown in the terminal and on pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Cell(NamedTuple):
    """Text of a table. best: the best value of its row; marked by a star in the terminal."""

    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """header: the names of the columns. rows: as many cells each; the first one names the row."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default=())


def cells(*texts: object) -> list[Cell]:
    return [each if isinstance(each, Cell) else Cell(str(each)) for each in texts]


def lines(table: Table) -> list[str]:
    """The table for the terminal, in columns that are as wide as their longest text."""
    texts = [[*table.header], *([cell.text + (" *" if cell.best else "") for cell in row] for row in table.rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(table.header))]
    shown = ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in texts]
    return [table.title, *(f"  {line}" for line in (shown if table.rows else [])), *(f"  {n}" for n in table.notes)]


def number(value: Any) -> str:
    """At most four significant digits; large integers with thousands separators."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{int(value):,}" if value.is_integer() and abs(value) < 1e15 else f"{value:.4g}"
