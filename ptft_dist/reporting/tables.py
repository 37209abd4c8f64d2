"""Rows as a table: a header, and a line for each row, separated by commas (.csv) or tabs (.tsv).

`data/formats.py` reads a table back with the same texts. A .tsv file has no quotes: a quotation mark is a character,
and a tab or a line break inside of a cell cannot be written.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from ptft_dist.reporting.messages import counted, warn

SEPARATORS = {".csv": ",", ".tsv": "\t"}
_NOT_IN_TSV = re.compile(r"\r\n|[\t\r\n]")


def table(rows: Callable[[], Iterable[Mapping[str, Any]]], separator: str) -> Iterator[bytes]:
    """The lines of a table, in UTF-8.

    A value within an object has a column of its own, with a dotted name such as `prediction.label`. Lists are JSON. A
    cell is empty where a row has no such value, or null. Columns have the order in which they first occur. Separated by
    tabs, a tab or a line break in a text becomes a space, with a warning at the end.

    Args:
        rows: is called twice, first for the names of the columns.
    """
    names = list(dict.fromkeys(name for row in rows() for name, _ in _cells("", row)))
    replaced: Counter[str] = Counter()
    for row in chain([dict(zip(names, names, strict=True))], (dict(_cells("", row)) for row in rows())):
        cells = [row.get(name, "") for name in names]
        if separator == "\t":
            replaced.update(name for name, cell in zip(names, cells, strict=True) if _NOT_IN_TSV.search(cell))
            line = separator.join(_NOT_IN_TSV.sub(" ", cell) for cell in cells)
        else:
            line = _quoted(cells, separator)
        # Half a surrogate pair, which UTF-8 cannot encode, is escaped.
        yield f"{line}\n".encode(errors="backslashreplace")
    if replaced:
        warn(
            f"{counted(replaced.total(), 'cell')} had tabs or line breaks, which a .tsv table cannot hold; they are "
            f"spaces now, in {', '.join(replaced)}. Name a .csv or .jsonl file to keep them"
        )


def _cells(prefix: str, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from _cells(f"{prefix}{name}.", value)
        elif isinstance(value, str):
            yield prefix + name, value
        else:
            yield prefix + name, "" if value is None else json.dumps(value, ensure_ascii=False)


def _quoted(cells: Sequence[str], separator: str) -> str:
    """A line of CSV, without its end. Cells are quoted where it is necessary."""
    line = io.StringIO(newline="")
    # csv quotes a line break only if it occurs in the line's end, so the end has both kinds.
    csv.writer(line, delimiter=separator, lineterminator="\r\n").writerow(cells)
    return line.getvalue().removesuffix("\r\n")
