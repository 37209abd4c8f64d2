"""A token store: the token ids of documents on disk, read as rows through memory maps.

    tokens.bin      uint16 (uint32 for vocabularies above 65,536), little-endian: all documents, concatenated
    documents.npy   int64 [D + 1]: the start of each document in tokens.bin, and at the end the number of tokens
    rows.npy        int64 [R, 2]: [start, end) of each row in tokens.bin; only without packing
    store.json      counts, settings, sizes and checksums of files; written last, so a store without it is incomplete

With packing, row i is tokens[i * max_length : (i + 1) * max_length], and only the last row may be shorter. Without
packing, each document is split into rows of its own. One-token rows are dropped and counted: nothing to predict.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from ptft_dist.errors import DataError

STORE_VERSION = 1
_HASHED_AT_ONCE = 1 << 22  # bytes
_BLOCK = 2**16  # numbers per write; one write per document would be slow for short documents
TOKENS, DOCUMENTS, ROWS, SUMMARY = "tokens.bin", "documents.npy", "rows.npy", "store.json"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of tokens."""

    input_ids: np.ndarray
    """int64 [T]."""
    document_starts: np.ndarray
    """int64, ascending: the positions in the row at which a document begins. The first is always 0, also if the row
    begins within a document."""
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Other columns of an example store, such as labels; concatenated if the row contains several examples."""

    @property
    def meta(self) -> dict[str, Any]:
        """Information for scoring a validation example, such as the reference text."""
        return json.loads(self.columns["meta"].tobytes())


class Store(Protocol):
    """Rows on disk."""

    path: Path
    tokens: int

    def __len__(self) -> int: ...
    def lengths(self, indices: np.ndarray) -> np.ndarray: ...
    def row(self, i: int) -> Row: ...
    def largest(self, count: int) -> list[Row]:
        """`count` rows as long as the longest row of the store: the largest possible micro-batch."""


def read_summary(path: Path, version: int) -> dict[str, Any]:
    """Read store.json, and check its version and the sizes of the store's files.

    Raises:
        DataError: the store is incomplete or damaged.
    """
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        if summary["version"] != version:
            raise ValueError(f"its version is {summary['version']}, this version of ptft reads {version}")
        for name, size in summary["files"].items():
            if (actual := (path / name).stat().st_size) != size:
                raise ValueError(f"{name} has {actual} bytes instead of {size}")
        return summary
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DataError:
    """The error for a store that cannot be read."""
    return DataError(f"{path}: this token store is damaged ({error}). Delete it and run ptft prepare again.")


class MappedStore:
    """Base class of memory-mapped stores. A store is pickled as its path, so that other processes open it again."""

    version: ClassVar[int]
    path: Path
    _count: int

    def __init__(self, path: Path, summary: dict[str, Any]) -> None:
        """Use `open`, which checks the files first."""
        raise NotImplementedError

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a store into memory; takes milliseconds for any size.

        Raises:
            DataError: the store is incomplete, or its files do not match store.json.
        """
        summary = read_summary(path, cls.version)
        try:
            return cls(path, summary)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(path, error) from error

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).open, (self.path,)

    def __len__(self) -> int:
        return self._count

    def known(self, indices: np.ndarray) -> np.ndarray:
        """Check row indices and return them as int64.

        Raises:
            IndexError: an index is out of range.
        """
        indices = np.asarray(indices, dtype=np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= self._count):
            raise IndexError(f"rows {indices.min()} to {indices.max()} of a store of {self._count}")
        return indices


def write_summary(path: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Complete a store: add the sizes and checksums of its files to the summary, and write store.json."""
    files = sorted(path.iterdir())
    summary["files"] = {file.name: file.stat().st_size for file in files}
    summary["checksums"] = {file.name: checksum(file) for file in files}
    (path / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def checksum(file: Path) -> str:
    """The hash of a file's contents: XXH3, 128 bits, as hexadecimal digits."""
    from xxhash import xxh3_128

    digest = xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def verify(path: Path) -> int:
    """Read all files of a store and compare their checksums; return their size in bytes.

    Raises:
        DataError: a file is missing, or its contents have changed; or the store was written without checksums.
    """
    try:
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        if "checksums" not in summary:
            raise ValueError("it was written by an earlier version of ptft, without checksums")
        for name, expected in summary["checksums"].items():
            if checksum(path / name) != expected:
                raise ValueError(f"the contents of {name} have changed")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(path, error) from error
    return sum(summary["files"].values())


class StoreWriter:
    """Writes a token store document by document. Memory does not grow with the number of tokens."""

    def __init__(self, path: Path, *, vocab_size: int, max_length: int, packing: bool) -> None:
        path.mkdir(parents=True)
        self._path = path
        self._max_length, self._packing = max_length, packing
        self._dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self._tokens = (path / TOKENS).open("wb")
        self._documents = Int64Stream(path / DOCUMENTS)
        self._rows = None if packing else Int64Stream(path / ROWS, columns=2)
        self._total = 0
        self._dropped = 0
        self._waiting: list[np.ndarray] = []
        self._waiting_tokens = 0

    def add(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document.

        Raises:
            ValueError: it has no tokens, or an id does not fit into the vocabulary's data type. The latter may be
                raised at a later call, because documents are written in blocks.
        """
        tokens = ids if isinstance(ids, np.ndarray) and ids.dtype == np.uint32 else np.asarray(ids, dtype=np.int64)
        if not len(tokens):
            raise ValueError("a document needs at least one token")
        self._waiting.append(tokens)
        self._waiting_tokens += len(tokens)
        if self._waiting_tokens >= _BLOCK:
            self._write_block()
        self._documents.append(self._total)
        end = self._total + len(tokens)
        if self._rows is not None:
            for start in range(self._total, end, self._max_length):
                stop = min(start + self._max_length, end)
                if stop - start > 1:
                    self._rows.append(start, stop)
                else:
                    self._dropped += 1
        self._total = end

    def _write_block(self) -> None:
        if not self._waiting:
            return
        block = np.concatenate(self._waiting)
        if block.min() < 0 or block.max() > np.iinfo(self._dtype).max:  # astype would wrap around silently
            raise ValueError(f"token ids {block.min()} to {block.max()} do not fit into {self._dtype}")
        self._tokens.write(block.astype(self._dtype).data)
        self._waiting, self._waiting_tokens = [], 0

    def extend(self, part: Path) -> None:
        """Append all documents of a completed store with the same settings.

        Raises:
            DataError: the store is damaged.
            OSError: an error of reading or writing.
        """
        store = TokenStore.open(part)
        assert (store.max_length, store.packing, store.dtype) == (self._max_length, self._packing, self._dtype)
        self._write_block()
        with (part / TOKENS).open("rb") as tokens:
            shutil.copyfileobj(tokens, self._tokens, 1 << 24)
        self._documents.extend(np.load(part / DOCUMENTS, mmap_mode="r")[:-1], self._total)
        if self._rows is not None:
            self._rows.extend(np.load(part / ROWS, mmap_mode="r"), self._total)
            self._dropped += store.dropped_tokens
        self._total += store.tokens + store.dropped_tokens

    def close(self) -> dict[str, Any]:
        """Complete the files and return the contents of store.json: counts and settings.

        Raises:
            ValueError: a token id does not fit into the vocabulary's data type.
        """
        self._write_block()
        self._tokens.close()
        documents = self._documents.count
        self._documents.append(self._total)
        self._documents.close()
        if self._rows is None:
            rows, rest = divmod(self._total, self._max_length)
            rows, self._dropped = (rows, 1) if rest == 1 else (rows + bool(rest), 0)
        else:
            rows = self._rows.count
            self._rows.close()
        summary = {
            "version": STORE_VERSION,
            "rows": rows,
            "tokens": self._total - self._dropped,
            "documents": documents,
            "dropped_tokens": self._dropped,
            "max_length": self._max_length,
            "packing": self._packing,
            "dtype": self._dtype.str,
        }
        return write_summary(self._path, summary)


class TokenStore(MappedStore):
    """The rows of a completed token store, read through memory maps."""

    version = STORE_VERSION

    def __init__(self, path: Path, summary: dict[str, Any]) -> None:
        """Use `TokenStore.open`, which checks the files first."""
        self.path = path
        self.max_length: int = summary["max_length"]
        self.packing: bool = summary["packing"]
        self.tokens: int = summary["tokens"]  # of all rows, without dropped tokens
        self.documents: int = summary["documents"]
        self.dropped_tokens: int = summary["dropped_tokens"]
        self.dtype = np.dtype(summary["dtype"])
        self._count: int = summary["rows"]
        self._total = self.tokens + self.dropped_tokens
        # Plain arrays over the memory maps, because slicing an np.memmap takes a few microseconds longer.
        self._tokens = np.asarray(np.memmap(path / TOKENS, dtype=self.dtype, mode="r")) if self._total else np.empty(0)
        self._documents = np.asarray(np.load(path / DOCUMENTS, mmap_mode="r"))
        self._rows = None if self.packing else np.asarray(np.load(path / ROWS, mmap_mode="r"))

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """The number of tokens in each row: int64, same shape as `indices`. Reads no token.

        Raises:
            IndexError: an index is out of range.
        """
        indices = self.known(indices)
        if self._rows is not None:
            return self._rows[indices, 1] - self._rows[indices, 0]
        return np.minimum(self._total - indices * self.max_length, self.max_length)

    def row(self, i: int) -> Row:
        """The row at index i.

        Raises:
            IndexError: i is out of range.
        """
        if not 0 <= i < self._count:
            raise IndexError(f"row {i} of a store of {self._count}")
        if self._rows is not None:
            start, stop = map(int, self._rows[i])
            return Row(self._tokens[start:stop].astype(np.int64), np.zeros(1, dtype=np.int64))
        start = i * self.max_length
        stop = min(start + self.max_length, self._total)
        first, last = np.searchsorted(self._documents, (start + 1, stop))
        starts = np.concatenate(([0], self._documents[first:last] - start))
        return Row(self._tokens[start:stop].astype(np.int64), starts)

    def document_lengths(self) -> np.ndarray:
        """The number of tokens of each document: int64 [D]."""
        return np.diff(self._documents)

    def largest(self, count: int) -> list[Row]:
        """`count` rows of max_length tokens. All tokens are 0, because only the size matters."""
        return [Row(np.zeros(self.max_length, np.int64), np.zeros(1, np.int64))] * count


class Int64Stream:
    """Writes a .npy file of int64, [N] or [N, columns], row by row; N is written at close."""

    def __init__(self, path: Path, columns: int | None = None) -> None:
        self._tail = () if columns is None else (columns,)
        self._file = path.open("wb")
        self._waiting = array("q")
        self.count = 0
        self._header_bytes = self._write_header()

    def append(self, *values: int) -> None:
        self._waiting.extend(values)
        self.count += 1
        if len(self._waiting) >= _BLOCK:
            self._write_block()

    def extend(self, values: np.ndarray, added: int) -> None:
        """Append an array [N] or [N, columns], with `added` added to each number."""
        self._write_block()
        for start in range(0, len(values), _BLOCK):
            self._file.write((values[start : start + _BLOCK] + added).astype("<i8").data)
        self.count += len(values)

    def close(self) -> None:
        self._write_block()
        self._file.seek(0)
        # NumPy pads the header, so it has the same length for a larger first dimension.
        assert self._write_header() == self._header_bytes
        self._file.close()

    def _write_block(self) -> None:
        self._file.write(np.array(self._waiting, dtype="<i8").data)
        del self._waiting[:]

    def _write_header(self) -> int:
        header = {"descr": "<i8", "fortran_order": False, "shape": (self.count, *self._tail)}
        np.lib.format.write_array_header_1_0(self._file, header)
        return self._file.tell()
