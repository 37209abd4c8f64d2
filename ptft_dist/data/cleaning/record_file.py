"""Records on disk: one JSON object per line, {"where": ..., "values": {...}}, compressed with Zstandard."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from ptft_dist.data.formats import Record
from ptft_dist.errors import DataError

_LEVEL = 3  # zstd's default: a third of the size at more than 200 MB/s


class RecordWriter:
    """Writes a file of records."""

    def __init__(self, path: Path) -> None:
        self._raw = path.open("wb")
        self._compressed = zstandard.ZstdCompressor(_LEVEL, write_checksum=True).stream_writer(self._raw)
        self.count = 0

    def add(self, record: Record) -> None:
        """Append a record.

        Raises:
            DataError: a value cannot be stored.
            OSError: the disk is full, or another error of writing.
        """
        try:
            line = json.dumps({"where": record.where, "values": record.values}, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{record.where}: data.steps: this row has a value that is no text, number, list or object ({error}). "
                "Leave its column out of the file."
            ) from error
        self._compressed.write(line.encode("utf-8", "surrogatepass") + b"\n")
        self.count += 1

    def close(self) -> None:
        """Complete the file."""
        self._compressed.close()
        self._raw.close()


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, in order.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            for line in io.BufferedReader(stream, 1 << 20):
                item: dict[str, Any] = json.loads(line.decode("utf-8", "surrogatepass"))
                yield Record(item["values"], item["where"])
    except (OSError, ValueError, KeyError, zstandard.ZstdError) as error:
        raise DataError(
            f"{path}: the cleaned records are damaged ({error}). Delete {path.parent} and start again."
        ) from (error)
