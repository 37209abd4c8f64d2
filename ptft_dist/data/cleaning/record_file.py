"""Records on disk: one JSON object per line, {"where": ..., "values": {...}}, compressed with Zstandard.

Labels that have names, as numbers of a ClassLabel feature, are numbers in `values`; the object's `names` has
their names. The last line has the number of records, {"records": N}, so that a shortened file is noticed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from ptft_dist.data.class_labels import ClassNames, names_in, with_names
from ptft_dist.data.formats import Record
from ptft_dist.data.json_values import not_json
from ptft_dist.errors import DataError

_END = "records"  # the key of the last line, whose value is the number of records
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
        item: dict[str, Any] = {"where": record.where, "values": record.values}
        if names := names_in(record.values):
            item["names"] = names
        try:
            line = json.dumps(item, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            columns = ", ".join(map(repr, not_json(record.values)))
            raise DataError(
                f"{record.where}: data.steps: the field {columns} is no text, number, list or object ({error}). Leave "
                "its column out of the file, or convert it to text."
            ) from error
        self._compressed.write(line.encode("utf-8", "surrogatepass") + b"\n")
        self.count += 1

    def close(self) -> None:
        """Complete the file."""
        self._compressed.write(json.dumps({_END: self.count}).encode() + b"\n")
        self._compressed.close()
        self._raw.close()


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, in order.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with path.open("rb") as raw, zstandard.ZstdDecompressor().stream_reader(raw) as stream:
            for count, line in enumerate(io.BufferedReader(stream, 1 << 20)):
                item: dict[str, Any] = json.loads(line.decode("utf-8", "surrogatepass"))
                if item.get(_END) == count:
                    return
                yield Record(with_names(item["values"], _by_number(item.get("names", {}))), item["where"])
        raise ValueError("its end is missing")
    except (OSError, ValueError, KeyError, zstandard.ZstdError) as error:
        raise DataError(
            f"{path}: the cleaned records are damaged ({error}). Delete {path.parent} and start again."
        ) from (error)


def _by_number(names: dict[str, dict[str, str]]) -> ClassNames:
    """Names of classes from JSON, whose keys are texts."""
    return {column: {int(number): name for number, name in each.items()} for column, each in names.items()}
