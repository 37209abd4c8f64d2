"""Base class of encoders of rows: checks rows, tokenizes the texts of many rows in one call, and builds examples."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ptft_dist.config.recipe import Source
from ptft_dist.config.token_ids import id_count
from ptft_dist.data.columns import missing_columns
from ptft_dist.data.encoder import Encoder, EncoderContext, Example, LeftOut, Outcome, RowError, Side
from ptft_dist.data.example_store import META, ExampleStore, ExampleWriter, as_column, meta_bytes, token_dtype
from ptft_dist.data.formats import Record, json_type, text_problem
from ptft_dist.data.report import Entry
from ptft_dist.data.sources import read_records
from ptft_dist.data.tokenizer import text_only_backend
from ptft_dist.errors import RecipeError

if TYPE_CHECKING:
    from tokenizers import Encoding


class RowEncoder(Encoder):
    """Encodes rows into an example store. Subclasses define the required roles, the texts and the examples of a row."""

    reads = "row"
    chunk_records = 512
    uses_processes = True
    store = ExampleStore

    columns: ClassVar[Mapping[str, str]] = {}
    """The store's columns besides input_ids and meta: name -> NumPy data type, `token` for token ids."""
    length_columns: ClassVar[tuple[str, ...]] = ("input_ids",)
    """The columns whose lengths add up to a row's length."""
    pretokenized: ClassVar[bool] = False
    """`pieces` returns lists of words instead of texts."""
    add_special_tokens: ClassVar[bool] = False
    """The tokenizer adds its special tokens to each piece ([CLS], [SEP])."""
    text_only: ClassVar[bool] = True
    """Encode special tokens in a text as plain text."""

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        tokenizer = context.tokenizer
        if not tokenizer.is_fast:
            raise RecipeError(
                f"tokenizer: {type(tokenizer).__name__} has no fast version (with a tokenizer.json), and task "
                f"{context.task} needs one. Use a model that has one, such as NLLB, mBART or mT5 instead of Marian or "
                "M2M100; or train a tokenizer with tokenizer.train"
            )
        self.backend = text_only_backend(tokenizer)
        self.backend.encode_special_tokens = self.text_only
        token = token_dtype(id_count(tokenizer))
        columns = {"input_ids": "token", **self.columns}
        self.dtypes = {name: token if dtype == "token" else dtype for name, dtype in columns.items()}
        unknown = tokenizer.unk_token_id
        self._unknown_id = None if unknown == tokenizer.eos_token_id else unknown

    # --- without a tokenizer -----------------------------------------------------------------------------------------

    @classmethod
    def required(cls, settings: Any) -> tuple[str, ...]:
        """The roles that every row needs a column for."""
        return tuple(settings.roles)

    @classmethod
    def read(cls, settings: Any, source: Source, base: Path) -> Iterator[Record]:
        return read_records(source, base, cls.required(settings))

    @classmethod
    def key(cls, record: Record) -> str:
        return json.dumps(record.values, sort_keys=True, default=str)

    @classmethod
    def check(cls, settings: Any, record: Record) -> None:
        require_all(record.values, cls.required(settings))

    # --- with the tokenizer ------------------------------------------------------------------------------------------

    def pieces(self, record: Record) -> Sequence[Any]:
        """The parts of a row to tokenize: texts, pairs of texts, or (`pretokenized`) lists of words.

        Raises:
            RowError: the row is invalid.
            LeftOut: the row is dropped.
        """
        raise NotImplementedError

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        """The examples of a row, from its tokenized pieces. Raises RowError or LeftOut, see `pieces`."""
        raise NotImplementedError

    def encode(self, pieces: Sequence[Any]) -> list[Any]:
        """Tokenize pieces of many rows. The result has what `build` uses of an `Encoding`."""
        return self.backend.encode_batch(
            list(pieces), is_pretokenized=self.pretokenized, add_special_tokens=self.add_special_tokens
        )

    def outcomes(self, records: Sequence[Record]) -> list[Outcome]:
        """The outcome of each row. The texts of all rows are tokenized in one call."""
        pieces: list[Any] = []
        slices: list[slice | Outcome] = []  # the row's part of `pieces`, or why it has none
        for record in records:
            try:
                self.check(self.settings, record)
                row_pieces = self.pieces(record)
            except (RowError, LeftOut) as reason:
                slices.append(_not_encoded(reason))
                continue
            slices.append(slice(len(pieces), len(pieces) + len(row_pieces)))
            pieces += row_pieces
        encodings = self.encode(pieces) if pieces else []
        return [
            part if isinstance(part, Outcome) else self._built(record, encodings[part])
            for record, part in zip(records, slices, strict=True)
        ]

    def _built(self, record: Record, encodings: Sequence[Encoding]) -> Outcome:
        try:
            examples = self.build(record, encodings)
        except (RowError, LeftOut) as reason:
            return _not_encoded(reason)
        unknown = sum(self._unknown(example) for example in examples)
        return Outcome([self._as_stored(example) for example in examples], unknown_tokens=unknown)

    def _as_stored(self, example: Example) -> Example:
        columns = {name: as_column(example.columns[name], dtype) for name, dtype in self.dtypes.items()}
        return Example(columns, example.meta, example.notes)

    def _unknown(self, example: Example) -> int:
        if self._unknown_id is None:
            return 0
        return sum(list(example.columns[name]).count(self._unknown_id) for name in self.length_columns)

    def length(self, example: Example) -> int:
        return sum(len(example.columns[name]) for name in self.length_columns)

    def writer(self, path: Path, side: Side) -> RowWriter:
        return RowWriter(self, path, side)


class RowWriter:
    """Writes examples to an example store, with meta in the validation store, and in both with `keeps_meta`."""

    def __init__(self, encoder: RowEncoder, path: Path, side: Side) -> None:
        self.notes: dict[str, Entry] = {}
        self._with_meta = side == "validation" or encoder.keeps_meta
        self._store = ExampleWriter(
            path,
            encoder.dtypes | {META: "u1"} if self._with_meta else encoder.dtypes,
            length_columns=encoder.length_columns,
            max_length=encoder.max_length,
            packing=encoder.settings.isolated,
        )

    def add(self, example: Example) -> None:
        meta = {META: meta_bytes(example.meta)} if self._with_meta else {}
        self._store.add({**example.columns, **meta})

    def close(self) -> dict[str, Any]:
        return self._store.close()


def _not_encoded(reason: RowError | LeftOut) -> Outcome:
    return Outcome(problem=str(reason)) if isinstance(reason, RowError) else Outcome(dropped=str(reason))


def require(values: Mapping[str, Any], role: str) -> Any:
    """The value of a role.

    Raises:
        RowError: the column is missing or null.
    """
    require_all(values, (role,))
    return values[role]


def require_all(values: Mapping[str, Any], roles: Sequence[str]) -> None:
    """Check that a row has a column for each role. The message names all that are missing.

    Raises:
        RowError: a column is missing or null.
    """
    if missing := {role: role for role in roles if role not in values}:
        raise RowError(missing_columns(missing, list(values), present=roles))
    for role in roles:
        if values[role] is None:
            raise RowError(f"the field {role!r} is null. Fill it in, or remove the row.")


def require_text(values: Mapping[str, Any], role: str, *, empty: bool = False) -> str:
    """The text of a role.

    Args:
        empty: the text may be empty or blank.

    Raises:
        RowError: the column is missing, null, not a text, or empty.
    """
    text = require(values, role)
    if problem := text_problem(role, text):
        raise RowError(problem)
    if not empty and not text.strip():
        raise RowError(f"the field {role!r} is empty. Fill it in, or remove the row.")
    return text


def require_list(values: Mapping[str, Any], role: str) -> list[Any]:
    """The list of a role.

    Raises:
        RowError: the column is missing, null or not a list.
    """
    value = require(values, role)
    if not isinstance(value, list):
        raise RowError(f"the field {role!r} is {json_type(value)} and not a list. Correct or remove the row.")
    return value
