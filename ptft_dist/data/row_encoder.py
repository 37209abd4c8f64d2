"""What all encoders of rows share: a row is checked, its texts are tokenized with many others, it is put together."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ptft_dist.config.recipe import Source
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
    """Rows with columns -> an example store. A subclass says what a row must have, which texts it holds, and which
    examples it becomes."""

    reads = "row"
    chunk_records = 512
    uses_processes = True
    store = ExampleStore

    columns: ClassVar[Mapping[str, str]] = {}
    """The store's columns beside input_ids and meta: name -> NumPy data type, `token` for token ids."""
    length_columns: ClassVar[tuple[str, ...]] = ("input_ids",)
    """The columns whose lengths together are a row's length."""
    pretokenized: ClassVar[bool] = False
    """`pieces` gives lists of words instead of texts."""
    add_special_tokens: ClassVar[bool] = False
    """The tokenizer puts its own special tokens around each piece ([CLS], [SEP])."""
    text_only: ClassVar[bool] = True
    """What a text spells is text, even if it spells a special token."""

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        tokenizer = context.tokenizer
        if not tokenizer.is_fast:
            raise RecipeError(f"tokenizer: task {context.task} needs a fast tokenizer (one with a tokenizer.json).")
        self.backend = text_only_backend(tokenizer)
        self.backend.encode_special_tokens = self.text_only
        token = token_dtype(max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1))
        columns = {"input_ids": "token", **self.columns}
        self.dtypes = {name: token if dtype == "token" else dtype for name, dtype in columns.items()}
        unknown = tokenizer.unk_token_id
        self._unknown_id = None if unknown == tokenizer.eos_token_id else unknown

    # --- before there is a tokenizer ---------------------------------------------------------------------------------

    @classmethod
    def required(cls, settings: Any) -> tuple[str, ...]:
        """The roles that every row must have a column for."""
        return tuple(settings.roles)

    @classmethod
    def read(cls, settings: Any, source: Source, base: Path) -> Iterator[Record]:
        return read_records(source, base, cls.required(settings))

    @classmethod
    def key(cls, record: Record) -> str:
        return json.dumps(record.values, sort_keys=True, default=str)

    @classmethod
    def check(cls, settings: Any, record: Record) -> None:
        for role in cls.required(settings):
            require(record.values, role)

    # --- with it -----------------------------------------------------------------------------------------------------

    def pieces(self, record: Record) -> Sequence[Any]:
        """What is to be tokenized: texts, pairs of texts, or (`pretokenized`) lists of words.

        Raises:
            RowError: the row cannot be used after all.
            LeftOut: it is dropped.
        """
        raise NotImplementedError

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        """The examples of a row from its tokenized pieces. Raises as `pieces`."""
        raise NotImplementedError

    def encode(self, pieces: Sequence[Any]) -> list[Encoding]:
        return self.backend.encode_batch(
            list(pieces), is_pretokenized=self.pretokenized, add_special_tokens=self.add_special_tokens
        )

    def outcomes(self, records: Sequence[Record]) -> list[Outcome]:
        """Each row's outcome; the texts of all rows are tokenized in one call."""
        pieces: list[Any] = []
        waiting: list[slice | Outcome] = []
        for record in records:
            try:
                self.check(self.settings, record)
                found = self.pieces(record)
            except (RowError, LeftOut) as reason:
                waiting.append(_not_encoded(reason))
                continue
            waiting.append(slice(len(pieces), len(pieces) + len(found)))
            pieces += found
        encodings = self.encode(pieces) if pieces else []
        return [
            place if isinstance(place, Outcome) else self._built(record, encodings[place])
            for record, place in zip(records, waiting, strict=True)
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

    def writer(self, path: Path, side: Side) -> RowWriter:
        return RowWriter(self, path, side)


class RowWriter:
    """An example store. That of the validation side also holds each example's meta."""

    def __init__(self, encoder: RowEncoder, path: Path, side: Side) -> None:
        self.notes: dict[str, Entry] = {}
        self._with_meta = side == "validation"
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
        RowError: there is none.
    """
    if role not in values:
        has = ", ".join(map(repr, values)) or "none"
        raise RowError(
            f"there is no field {role!r}; the fields are: {has}. Name the one that holds it with fields: "
            f"{{{role}: ...}}."
        )
    if values[role] is None:
        raise RowError(f"the field {role!r} is null. Fill it in, or remove the row.")
    return values[role]


def require_text(values: Mapping[str, Any], role: str, *, empty: bool = False) -> str:
    """The text of a role. empty: it may have no visible character.

    Raises:
        RowError: there is none.
    """
    text = require(values, role)
    if problem := text_problem(role, text):
        raise RowError(problem)
    if not empty and not text.strip():
        raise RowError(f"the field {role!r} is empty. Fill it in, or remove the row.")
    return text


def require_list(values: Mapping[str, Any], role: str) -> list[Any]:
    """
    Raises:
        RowError: the role's value is not a list.
    """
    found = require(values, role)
    if not isinstance(found, list):
        raise RowError(f"the field {role!r} holds {json_type(found)} and not a list. Correct or remove the row.")
    return found
