"""An example store: rows with several columns on disk, read through memory maps.

    <column>.bin           the values of all examples, concatenated
    <column>.offsets.npy   int64 [N + 1]: the start of each example in the .bin file, and at the end the total length
    rows.npy, members.npy  only with packing: int64 [R + 1] and [N]; row r has the examples members[rows[r]:rows[r + 1]]
    lengths.npy            only with packing: int64 [R], the number of tokens in each row
    store.json             counts, columns and file sizes; written last, so a store without it is incomplete

Every store has the column `input_ids`. The column `meta` is JSON in UTF-8 with information for scoring an example; a
packed row, which may have several, is read without it.
"""

from __future__ import annotations

import bisect
import json
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ptft_dist.data.store import Int64Stream, MappedStore, Row, write_summary

EXAMPLE_STORE_VERSION = 1
META = "meta"
_BLOCK = 2**16  # values per write
_SCANNED = 2**20  # rows searched for the largest ones


def token_dtype(vocab_size: int) -> str:
    return "<u2" if vocab_size <= 2**16 else "<u4"


class ExampleWriter:
    """Writes an example store, example by example. With packing, the lengths of all examples are kept in memory."""

    def __init__(
        self,
        path: Path,
        columns: Mapping[str, str],
        *,
        length_columns: Sequence[str] = ("input_ids",),
        max_length: int,
        packing: bool = False,
    ) -> None:
        """columns: name -> NumPy data type. length_columns: the columns whose lengths add up to a row's length."""
        path.mkdir(parents=True)
        self._path, self._max_length, self._packing = path, max_length, packing
        self._length_columns = tuple(length_columns)
        self._columns = {name: _Column(path, name, dtype) for name, dtype in columns.items()}
        self._lengths = array("q")
        self._tokens = 0

    def add(self, example: Mapping[str, Any]) -> None:
        """Append one example: column -> values [T] or a single number.

        Raises:
            ValueError: a value does not fit into the column's data type.
        """
        for name, column in self._columns.items():
            column.add(example[name])
        length = sum(len(example[name]) for name in self._length_columns)
        self._tokens += length
        if self._packing:
            self._lengths.append(length)

    def close(self) -> dict[str, Any]:
        """Complete the files and return the contents of store.json."""
        for column in self._columns.values():
            column.close()
        examples = next(iter(self._columns.values())).count
        rows = examples
        if self._packing:
            packed = best_fit(np.array(self._lengths, np.int64), self._max_length)
            rows = len(packed)
            np.save(self._path / "rows.npy", np.cumsum([0, *map(len, packed)]))
            members = np.array([i for row in packed for i in row], np.int64)
            np.save(self._path / "members.npy", members)
            lengths = np.array(self._lengths, np.int64)
            np.save(self._path / "lengths.npy", np.array([lengths[row].sum() for row in packed], np.int64))
        summary = {
            "version": EXAMPLE_STORE_VERSION,
            "rows": rows,
            "examples": examples,
            "tokens": self._tokens,
            "columns": {name: column.dtype.str for name, column in self._columns.items()},
            "length_columns": self._length_columns,
            "max_length": self._max_length,
            "packing": self._packing,
        }
        return write_summary(self._path, summary)


class ExampleStore(MappedStore):
    """The rows of a completed example store, read through memory maps."""

    version = EXAMPLE_STORE_VERSION

    def __init__(self, path: Path, summary: dict[str, Any]) -> None:
        """Use `ExampleStore.open`, which checks the files first."""
        self.path = path
        self.tokens: int = summary["tokens"]
        self.examples: int = summary["examples"]
        self._count: int = summary["rows"]
        self.length_columns: list[str] = summary["length_columns"]
        self._columns = {
            name: (_mapped(path / f"{name}.bin", dtype), _loaded(path / f"{name}.offsets.npy"))
            for name, dtype in summary["columns"].items()
        }
        packing = summary["packing"]
        self._rows = _loaded(path / "rows.npy") if packing else None
        self._members = _loaded(path / "members.npy") if packing else None
        self._row_lengths = _loaded(path / "lengths.npy") if packing else None

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """The number of tokens in each row: int64, same shape as `indices`.

        Raises:
            IndexError: an index is out of range.
        """
        indices = self.known(indices)
        if self._row_lengths is not None:
            return self._row_lengths[indices]
        total = np.zeros(indices.shape, np.int64)
        for name in self.length_columns:
            offsets = self._columns[name][1]
            total += offsets[indices + 1] - offsets[indices]
        return total

    def row(self, i: int) -> Row:
        """The row at index i.

        Raises:
            IndexError: i is out of range.
        """
        if not 0 <= i < self._count:
            raise IndexError(f"row {i} of a store of {self._count}")
        if self._rows is None or self._members is None:
            return self._example(i)
        examples = [self._example(int(m)) for m in self._members[self._rows[i] : self._rows[i + 1]]]
        starts = np.cumsum([0, *(len(example.input_ids) for example in examples[:-1])])
        names = [name for name in examples[0].columns if name != META]  # which describes one example
        columns = {name: np.concatenate([example.columns[name] for example in examples]) for name in names}
        return Row(np.concatenate([e.input_ids for e in examples]), starts, columns)

    def _example(self, i: int) -> Row:
        columns = {}
        for name, (values, offsets) in self._columns.items():
            column = values[offsets[i] : offsets[i + 1]]
            columns[name] = column if name == META or column.dtype.kind == "f" else column.astype(np.int64)
        return Row(columns.pop("input_ids"), np.zeros(1, np.int64), columns)

    def largest(self, count: int) -> list[Row]:
        """The `count` longest of the first million rows, repeated if there are fewer."""
        lengths = self.lengths(np.arange(min(self._count, _SCANNED)))
        longest = np.argsort(-lengths, kind="stable")[:count]
        return [self.row(int(longest[i % len(longest)])) for i in range(count)]


class _Column:
    """Writes one column of a store."""

    def __init__(self, path: Path, name: str, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self._file = (path / f"{name}.bin").open("wb")
        self._offsets = Int64Stream(path / f"{name}.offsets.npy")
        self._waiting: list[np.ndarray] = []
        self._waiting_values = 0
        self._total = 0
        self.count = 0

    def add(self, values: Any) -> None:
        column = as_column(values, self.dtype)
        self._offsets.append(self._total)
        self._total += len(column)
        self.count += 1
        self._waiting.append(column)
        self._waiting_values += len(column)
        if self._waiting_values >= _BLOCK:
            self._write_block()

    def close(self) -> None:
        self._write_block()
        self._file.close()
        self._offsets.append(self._total)
        self._offsets.close()

    def _write_block(self) -> None:
        if self._waiting_values:
            self._file.write(np.concatenate(self._waiting).data)
        self._waiting, self._waiting_values = [], 0


def as_column(values: Any, dtype: str | np.dtype[Any]) -> np.ndarray:
    """The values of one example as an array of the column's data type: [T].

    Raises:
        ValueError: a value does not fit into the data type.
    """
    target = np.dtype(dtype)
    if isinstance(values, np.ndarray) and values.dtype == target and values.ndim == 1:
        return values
    array = np.frombuffer(values, np.uint8) if isinstance(values, bytes) else np.atleast_1d(np.asarray(values))
    if target.kind != "f" and len(array):
        limits = np.iinfo(target)
        if array.min() < limits.min or array.max() > limits.max:  # astype would wrap around silently
            raise ValueError(f"values {array.min()} to {array.max()} do not fit into {target}")
    return array.astype(target)


def _loaded(path: Path) -> np.ndarray:
    """A plain array over the memory map, because slicing an np.memmap takes a few microseconds longer."""
    return np.asarray(np.load(path, mmap_mode="r"))


def _mapped(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def meta_bytes(meta: Mapping[str, Any]) -> bytes:
    """JSON in UTF-8. Half a surrogate pair, which UTF-8 cannot encode, is escaped."""
    return json.dumps(meta, ensure_ascii=False).encode(errors="backslashreplace")


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Pack examples into rows of at most `capacity` tokens: for each row, the indices of its examples.

    Best-fit decreasing (Johnson 1974): the longest example comes first, and each goes into the fullest row with enough
    space. An example longer than `capacity` gets a row of its own.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []  # the distinct free spaces, ascending
    with_space: dict[int, list[int]] = {}
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            row, space = len(rows), max(capacity, length)
            rows.append([])
        else:
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        rows[row].append(i)
        left = space - length
        if left:
            if left not in with_space:
                bisect.insort(spaces, left)
                with_space[left] = []
            with_space[left].append(row)
    return rows
