"""Reads one file as a stream of records or documents. Every error names the file and the line."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ptft_dist.data.class_labels import of_parquet, with_names
from ptft_dist.data.columns import missing_columns, missing_text
from ptft_dist.data.json_values import DECODER, unusable
from ptft_dist.data.nested_json import nested_rows
from ptft_dist.data.text_files import COMPRESSIONS, opened_lines
from ptft_dist.errors import DataError

FORMATS = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".conll")
_BINARY = (".parquet", ".arrow")
KNOWN = ", ".join(FORMATS) + ", and all but .parquet and .arrow also as .gz or .zst"

_SPACE = " \t\n\r"

DocumentUnit = Literal["file", "paragraph", "line"]


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a source: column name -> value (a .txt file has the single column `text`), and its location."""

    values: dict[str, Any]
    where: str


class MissingColumns(DataError):
    """A table lacks required columns. The message does not know their roles: the reader of the source does."""

    def __init__(self, where: str, missing: Sequence[str], has: Sequence[str]) -> None:
        super().__init__(f"{where}: {missing_columns({column: column for column in missing}, has)}")
        self.where, self.has = where, has


def check_columns(columns: Sequence[str], has: Sequence[str], where: str) -> None:
    """Raises MissingColumns if a table lacks one of the columns."""
    if missing := [column for column in columns if column not in has]:
        raise MissingColumns(where, missing, has)


@dataclass(frozen=True, slots=True)
class Document:
    """A text and its location for messages: "file:line", "file:line (row 2)" of an array in one line, "file",
    "file#row" or "hub:name[split]#row"."""

    text: str
    where: str


def file_format(path: Path) -> tuple[str, str] | None:
    """(format, compression) from the file name, such as (".jsonl", ".gz") or (".csv", ""); None if it is unknown."""
    name = path.name.lower()
    compression = next((suffix for suffix in COMPRESSIONS if name.endswith(suffix)), "")
    suffix = next((suffix for suffix in FORMATS if name.removesuffix(compression).endswith(suffix)), None)
    if suffix is None or (suffix in _BINARY and compression):
        return None
    return suffix, compression


def read_file(path: Path, *, columns: Sequence[str], unit: DocumentUnit, only: bool = False) -> Iterator[Record]:
    """The records of one file, in order.

    Args:
        columns: required columns. Tables are checked once, at their header. In other formats, records without these
            columns are returned too.
        unit: the unit of documents in a .txt file. Line endings within a document are kept.
        only: skip all other columns if this saves work.

    Raises:
        DataError: the file cannot be read, is malformed or has no record.
    """
    kind = file_format(path)
    if kind is None:
        raise DataError(f"{path}: unknown file type. Supported are: {KNOWN}")
    if kind[0] in _BINARY:
        records = _read_arrow(path, columns, only, parquet=kind[0] == ".parquet")
    else:
        records = _read_text(path, *kind, columns, unit)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise DataError(f"{path}: the file has no documents. Remove it, or exclude it from the glob.")


def _read_text(path: Path, kind: str, compression: str, columns: Sequence[str], unit: DocumentUnit) -> Iterator[Record]:
    with opened_lines(path, compression) as lines:
        if kind == ".txt":
            for document in _read_txt(lines, path, unit):
                yield Record({"text": document.text}, document.where)
        elif kind == ".jsonl":
            yield from _read_jsonl(lines, path)
        elif kind == ".json":
            yield from _read_json("".join(lines), path)
        elif kind == ".conll":
            yield from _read_conll(lines, path)
        else:
            yield from _read_table(lines, path, columns, tabs=kind == ".tsv")


def _read_txt(lines: Iterator[str], path: Path, unit: DocumentUnit) -> Iterator[Document]:
    if unit == "file":
        text = "".join(lines)
        if text:
            yield Document(text, str(path))
        return
    if unit == "line":
        for number, line in enumerate(lines, 1):
            yield Document(line.rstrip("\r\n"), f"{path}:{number}")
        return
    block: list[str] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            block.append(line)
        elif block:
            yield Document("".join(block).rstrip("\r\n"), f"{path}:{number - len(block)}")
            block = []
    if block:
        yield Document("".join(block).rstrip("\r\n"), f"{path}:{number - len(block) + 1}")


def _read_jsonl(lines: Iterator[str], path: Path) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = DECODER.decode(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg}, column {error.colno}). {_A_ROW}") from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where}: {unusable(error)}") from None
        yield as_record(row, where)


def _read_json(text: str, path: Path) -> Iterator[Record]:
    """Parses the objects of an array one by one, so that each error can name its line; or the rows in an object.

    Of several rows in a line, as where the whole array is one, those after the first are also named by their number.
    """
    if text.lstrip(_SPACE).startswith("{"):
        yield from _read_object(text, path)
        return
    line, counted = 1, 0

    def refuse(position: int, problem: str) -> DataError:
        number = line + text.count("\n", counted, position)
        return DataError(
            f"{path}:{number}: {problem}. A .json file must be one array of objects; .jsonl has one per line."
        )

    def skip(position: int) -> int:
        while text[position : position + 1] in tuple(_SPACE):
            position += 1
        return position

    position = skip(0)
    if text[position : position + 1] != "[":
        raise refuse(position, "this is not an array")
    position = skip(position + 1)
    if text[position : position + 1] == "]":
        return
    last = 0
    for number in itertools.count(1):
        line, counted = line + text.count("\n", counted, position), position
        where, last = f"{path}:{line}" + f" (row {number})" * (line == last), line
        try:
            row, end = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise refuse(error.pos, f"not JSON ({error.msg}, column {error.colno})") from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where}: {unusable(error)}") from None
        yield as_record(row, where)
        position = skip(end)
        separator = text[position : position + 1]
        if separator == "]":
            break
        if separator != ",":
            raise refuse(position, "expected a comma or the closing bracket")
        position = skip(position + 1)
    position = skip(position + 1)
    if position < len(text):
        raise refuse(position, "there is text after the end of the array")


def _read_object(text: str, path: Path) -> Iterator[Record]:
    try:
        value = DECODER.decode(text)
    except json.JSONDecodeError as error:
        several = " If each line is an object, name the file .jsonl." if error.msg == "Extra data" else ""
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}, column {error.colno}).{several}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path}: {unusable(error)}") from None
    for row, where in nested_rows(value, str(path)):
        yield as_record(row, where)


def _read_table(lines: Iterator[str], path: Path, columns: Sequence[str], *, tabs: bool) -> Iterator[Record]:
    """Reads CSV with RFC 4180 quotes, or tab-separated values, in which quotes have no meaning."""
    csv.field_size_limit(sys.maxsize)  # many documents are longer than the default, 128 KiB
    rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines, strict=True)
    header: list[str] | None = None
    first_line = 1
    try:
        for row in rows:
            where = f"{path}:{first_line}"
            first_line = rows.line_num + 1
            if not row:
                continue  # an empty line
            if header is None:
                header = row
                _check_header(header, columns, where)
            elif len(row) != len(header):
                raise DataError(
                    f"{where}: this row has {len(row)} columns, but the header has {len(header)}. Check the row for a "
                    f"stray {'tab' if tabs else 'comma or quote'}."
                )
            else:
                yield Record(dict(zip(header, row, strict=True)), where)
    except csv.Error as error:
        raise DataError(
            f"{path}:{first_line}: not {'TSV' if tabs else 'CSV'} ({error}). Check the row for a stray quote."
        ) from None


def _check_header(header: list[str], columns: Sequence[str], where: str) -> None:
    check_columns(columns, header, where)
    for column in header:
        if header.count(column) > 1 and (column in columns or not columns):
            raise DataError(
                f"{where}: the header has {header.count(column)} columns named {column!r}. Rename all but one."
            )


def _read_conll(lines: Iterator[str], path: Path) -> Iterator[Record]:
    """Reads sentences with one word and its tag per line, separated by empty lines: columns `tokens` and `tags`.

    The word is the first field of a line, the tag is the last. Fields are separated by tabs or, in lines without tabs,
    by spaces. Other white space is part of a word. A `-DOCSTART-` line (CoNLL-2003) ends a sentence and is not a word.
    Comments (CoNLL-U), such as `# sent_id = 1`, are skipped: lines that begin with "# " and contain " = ". Any other #
    is a word.
    """
    tokens: list[str] = []
    tags: list[str] = []
    first = 0
    for number, line in enumerate(itertools.chain(lines, ("",)), 1):
        text = line.rstrip("\r\n")
        fields = text.split("\t") if "\t" in text else [part for part in text.split(" ") if part]
        if not line.strip() or fields[0] == "-DOCSTART-":
            if tokens:
                yield Record({"tokens": tokens, "tags": tags}, f"{path}:{first}")
            tokens, tags = [], []
            continue
        if text.startswith("# ") and " = " in text:
            continue
        if len(fields) < 2 or not fields[0] or not fields[-1].strip():
            raise DataError(
                f"{path}:{number}: a line needs a word and a tag, separated by a tab or spaces; got "
                f"{line.strip()!r}. An empty line ends a sentence."
            )
        first = first if tokens else number
        tokens.append(fields[0])
        tags.append(fields[-1].strip())


def _read_arrow(path: Path, columns: Sequence[str], only: bool, *, parquet: bool) -> Iterator[Record]:
    """Reads a Parquet file, or an Arrow stream, as `datasets.save_to_disk` writes it."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.ipc  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    number = 0
    try:
        with pq.ParquetFile(path) if parquet else pyarrow.ipc.open_stream(pa.memory_map(str(path))) as file:
            schema = file.schema_arrow if parquet else file.schema
            check_columns(columns, schema.names, str(path))
            chosen = list(columns) if only else None
            batches = file.iter_batches(batch_size=1000, columns=chosen) if parquet else file
            classes = of_parquet(schema.metadata)
            for batch in batches:
                for row in (batch.select(chosen) if only else batch).to_pylist():
                    yield Record(with_names(row, classes), f"{path}#{number}")
                    number += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        what = "a Parquet file" if parquet else "an Arrow stream of `datasets.save_to_disk`"
        raise DataError(f"{path}: not {what}, or damaged ({error}). Create or download it again.") from error
    except (OverflowError, ValueError, LookupError) as error:  # such as a date after the year 9999
        raise DataError(
            f"{path}#{number}: a value of this row or of a later one cannot be read ({error}). Correct it, or convert "
            "its column to text."
        ) from error


_A_ROW = 'Each line must be one object, such as {"text": "..."}.'


def as_record(row: Any, where: str) -> Record:
    """The record of a parsed JSON row.

    Raises:
        DataError: the row is not an object.
    """
    if not isinstance(row, dict):
        raise DataError(f"{where}: this row is {json_type(row)} and not an object. {_A_ROW}")
    return Record(row, where)


def as_document(record: Record, field: str, key: str | None = None) -> Document:
    """The text in column `field` of a record. key: that of its source, for messages.

    Raises:
        DataError: the column is missing or not a text.
    """
    if field not in record.values:
        raise DataError(f"{record.where}: {missing_text(field, list(record.values), key)}")
    text = record.values[field]
    if problem := text_problem(field, text):
        raise DataError(f"{record.where}: {problem} Correct or remove the row.")
    return Document(text, record.where)


def text_problem(name: str, text: Any) -> str | None:
    """Why the value of column `name` is not a valid text; None if it is valid."""
    if not isinstance(text, str):
        return f"the field {name!r} is {json_type(text)} and not text."
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair, which tokenizers refuse
        return (
            f"character {error.start} of the field {name!r}, {text[error.start]!r}, is half of a surrogate pair, "
            "which is not valid Unicode."
        )
    return None


def json_type(value: Any) -> str:
    """The JSON type of a value, with its article, for messages."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else f"a {type(value).__name__}")
