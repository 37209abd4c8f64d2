"""Rows as a table: a header, and a line for each row, separated by commas (.csv) or tabs (.tsv)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

SEPARATORS = {".csv": ",", ".tsv": "\t"}


def table(rows: Callable[[], Iterable[Mapping[str, Any]]], separator: str) -> Iterator[bytes]:
    """The lines of a table, in UTF-8.

    A value within an object has a column of its own, with a dotted name such as `prediction.label`. Lists are JSON. A
    cell is empty where a row has no such value, or null. Columns have the order in which they first occur.

    Args:
        rows: is called twice, first for the names of the columns.
    """
    names = list(dict.fromkeys(name for row in rows() for name, _ in _cells("", row)))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, names, delimiter=separator, lineterminator="\n")
    writer.writeheader()
    for row in rows():
        yield _taken(buffer)
        writer.writerow(dict(_cells("", row)))
    yield _taken(buffer)


def _cells(prefix: str, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _cells(f"{prefix}{name}.", value)
        elif isinstance(value, str):
            yield prefix + name, value
        else:
            yield prefix + name, "" if value is None else json.dumps(value, ensure_ascii=False)


def _taken(buffer: io.StringIO) -> bytes:
    """What was written since the last call. Half a surrogate pair, which UTF-8 cannot encode, is escaped."""
    text = buffer.getvalue()
    buffer.seek(0)
    buffer.truncate()
    return text.encode(errors="backslashreplace")
