"""What columns a file of data has: kinds, values, lengths and languages, before anything is known about the task."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ptft_dist.config.places import expanded
from ptft_dist.config.recipe import Source
from ptft_dist.data.formats import FORMATS, KNOWN, DocumentUnit, file_format, read_file
from ptft_dist.data.sources import source_files
from ptft_dist.errors import DataError

MOST_ROWS = 20_000
"""Rows at the beginning that are looked at."""
_MOST_VALUES = 5_000  # different values of a column that are counted
_LANGUAGE_ROWS = 200
_FIRST = 500  # values of a column that are kept
_MANY_DOCUMENTS = 20
_LONGEST_VALUE = 100  # characters of a value that may be a label
# A Han or Kana character is about a token; a word or punctuation mark is one to two.
_PIECE = re.compile(
    "[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+|[^\\w\\s]"
)
_TOKENS_PER_PIECE = 1.5


@dataclass
class Column:
    """A column."""

    name: str
    kinds: Counter[str] = field(default_factory=Counter)
    """Kind -> number of its values: text, number, boolean, texts, numbers, messages, turns, message, answers, other."""
    values: Counter[str] = field(default_factory=Counter)
    """Short values, and short items of `texts`, with how often they occur; only the first 5,000 different ones."""
    tokens: list[int] = field(default_factory=list)
    """Estimated number of tokens of each row's value; 0 without text."""
    numeric: bool = True
    """All values are numbers, or texts of numbers."""
    whole: bool = True
    """All numbers are whole numbers."""
    first: list[Any] = field(default_factory=list)
    """The first values."""

    @property
    def kind(self) -> str:
        """The kind of all values; `mixed` if there are several, `empty` if there are no values."""
        return next(iter(self.kinds), "empty") if len(self.kinds) < 2 else "mixed"

    @property
    def rows(self) -> int:
        """Number of rows with a value."""
        return sum(self.kinds.values())

    def add(self, value: Any) -> None:
        """Take note of the value of the next row."""
        self.tokens.append(estimated_tokens(text_of(value)))
        kind = kind_of(value)
        if kind is None:
            return
        self.kinds[kind] += 1
        if len(self.first) < _FIRST:
            self.first.append(value)
        for item in value if kind == "texts" else [value]:
            shown = str(item)
            if len(shown) <= _LONGEST_VALUE and (shown in self.values or len(self.values) < _MOST_VALUES):
                self.values[shown] += 1
        if kind in ("number", "text"):
            try:
                self.whole &= isinstance(value, int) or float(value).is_integer()
            except ValueError:
                self.numeric = False
        else:
            self.numeric = False

    def at_quantile(self, share: float) -> int:
        """Estimated tokens of the value at a quantile of the values with text; 0 if there are none."""
        return quantile([count for count in self.tokens if count], share)


@dataclass(frozen=True)
class Survey:
    """What the rows at the beginning of some files look like."""

    pattern: str
    """The file, or a glob for the files of a folder."""
    files: list[Path]
    unit: DocumentUnit | None
    """What a document of a .txt file should be."""
    rows: int
    complete: bool
    """Whether these are all rows."""
    columns: dict[str, Column]

    def languages(self, columns: Iterable[str]) -> Counter[str]:
        """ISO 639 code -> number of texts in the first 200 values of these columns."""
        from ptft_dist.data.cleaning.language import language_of

        values = chain.from_iterable(self.columns[name].first[:_LANGUAGE_ROWS] for name in columns)
        return Counter(language_of(text_of(value))[0] for value in values)


def survey(path: Path) -> Survey:
    """Look at a file, a glob, or the files of a folder.

    Raises:
        DataError: there is no such file, it cannot be read, or a folder has files of several formats.
    """
    pattern = _pattern(expanded(path))
    files = source_files(Source(path=str(pattern)), Path.cwd())
    unit = _unit(files[0])
    records = chain.from_iterable(read_file(file, columns=(), unit=unit or "file") for file in files)
    columns: dict[str, Column] = {}
    rows = 0
    for record in islice(records, MOST_ROWS):
        for name in record.values:
            columns.setdefault(name, Column(name, tokens=[0] * rows))
        for name, column in columns.items():
            column.add(record.values.get(name))
        rows += 1
    return Survey(str(pattern), files, unit, rows, next(records, None) is None, columns)


def _pattern(path: Path) -> Path:
    """The files of a folder as a glob."""
    if not path.is_dir():
        return path
    kinds = Counter("".join(kind) for file in sorted(path.rglob("*")) if file.is_file() and (kind := file_format(file)))
    if len(kinds) != 1:
        has = ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "no data file"
        raise DataError(f"{path}: the folder has {has}. Name files of one format with a glob. Formats: {KNOWN}.")
    return path / "**" / f"*{next(iter(kinds))}"


def _unit(file: Path) -> DocumentUnit | None:
    """The unit that makes many documents of a .txt file; None for other formats."""
    kind = file_format(file)
    if kind is None or kind[0] != FORMATS[0]:
        return None
    units: tuple[DocumentUnit, ...] = ("paragraph", "line")
    for unit in units:
        if len(list(islice(read_file(file, columns=(), unit=unit), _MANY_DOCUMENTS))) == _MANY_DOCUMENTS:
            return unit
    return "file"


def kind_of(value: Any) -> str | None:
    """The kind of a value, see `Column.kinds`; None if there is no value. An empty list says nothing."""
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, bool | int | float | str):
        return "boolean" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"
    if isinstance(value, Mapping):
        names = set(value)
        return "answers" if {"text", "answer_start"} <= names else _kind_of_message(names) or "other"
    if isinstance(value, list):
        first = value[0]
        if isinstance(first, Mapping):
            kind = _kind_of_message(set(first))
            return {"message": "messages", "turn": "turns"}.get(kind or "", "other")
        if all(isinstance(each, str) for each in value):
            return "texts"
        return "numbers" if all(isinstance(each, int) for each in value) else "other"
    return "other"


def _kind_of_message(names: set[str]) -> str | None:
    return "message" if {"role", "content"} <= names else "turn" if {"from", "value"} <= names else None


def text_of(value: Any) -> str:
    """The text in a value: its own, or that of its items, messages and their parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return text_of(value.get("content") or value.get("value") or value.get("text") or "")
    if isinstance(value, list):
        return " ".join(filter(None, map(text_of, value)))
    return ""


def quantile(counts: list[int], share: float) -> int:
    """The count at a quantile; 0 of none."""
    ordered = sorted(counts)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


def estimated_tokens(text: str) -> int:
    """About how many tokens a tokenizer makes of a text: one and a half for each word, punctuation mark or Han
    character."""
    return round(_TOKENS_PER_PIECE * sum(1 for _ in _PIECE.finditer(text)))


def counted(values: Counter[str], most: int = 6) -> Iterator[str]:
    """The most frequent values with their numbers, as text."""
    for value, count in values.most_common(most):
        yield f"{value}: {count:,}"
    if len(values) > most:
        yield f"and {len(values) - most:,} more"
