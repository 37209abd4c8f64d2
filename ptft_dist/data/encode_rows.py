"""Rows of a task into example stores, as a stream: read, put on a side, augment, check, encode in chunks, write."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.augment import Augmenter
from ptft_dist.data.encode import check_sides, text_progress
from ptft_dist.data.example_store import META, ExampleWriter, meta_bytes
from ptft_dist.data.formats import Record
from ptft_dist.data.row_encoder import Example, LeftOut, RowEncoder, RowError
from ptft_dist.data.sides import of_train, sided
from ptft_dist.data.sources import read_records
from ptft_dist.data.tokenizer import learnable
from ptft_dist.errors import DataError
from ptft_dist.tasks.registry import encoder_class

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK_ROWS = 512  # in one call of the tokenizer
_SHOWN = 10


def training_records(recipe: Recipe, base: Path, bad: BadRows | None = None) -> Iterator[Record]:
    """The usable rows of the training side. bad: is told of the others."""
    found = encoder_class(recipe.task)
    told = BadRows() if bad is None else bad
    for record in of_train(recipe.data, _reader(recipe, base), row_key):
        if told.passes(found, recipe, record):
            yield record


def training_texts(recipe: Recipe, base: Path) -> Iterator[str]:
    """The texts of the training side: what a tokenizer may learn from."""
    bad = BadRows()
    found = encoder_class(recipe.task)
    for record in training_records(recipe, base, bad):
        for text in found.texts(recipe, record):
            yield from learnable(text, record.where)
    bad.stop_if_any(recipe)


def survey(recipe: Recipe, base: Path) -> dict[str, Any]:
    """What the task must know of the training rows before one is encoded.

    Raises:
        DataError: there are bad rows, or the rows together make no sense.
    """
    found = encoder_class(recipe.task)
    if not found.surveys:
        return {}
    bad = BadRows()
    facts = found.survey(recipe, training_records(recipe, base, bad))
    bad.stop_if_any(recipe)
    return facts


def row_key(record: Record) -> str:
    """The text that decides on which side a row falls."""
    return json.dumps(record.values, sort_keys=True, default=str)


@dataclass
class BadRows:
    """Rows that cannot be used, and why."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, record: Record, why: object) -> None:
        self.count += 1
        if len(self.first) < _SHOWN:
            self.first.append(f"{record.where}: {why}")

    def passes(self, encoder: type[RowEncoder], recipe: Recipe, record: Record) -> bool:
        try:
            encoder.check(recipe, record)
        except RowError as error:
            self.add(record, error)
            return False
        return True

    def stop_if_any(self, recipe: Recipe) -> None:
        """
        Raises:
            DataError: there are bad rows, and the recipe does not want them skipped.
        """
        if self.count and recipe.data.bad_rows == "stop":
            more = f"\nand {self.count - len(self.first):,} more rows" if self.count > len(self.first) else ""
            rows = "this row" if self.count == 1 else f"these {self.count:,} rows"
            raise DataError(
                "\n".join(self.first) + f"{more}\nCorrect {rows}, or leave bad rows out with data.bad_rows: skip."
            )


@dataclass
class Notes:
    """How often something was done to rows, and where first: reason -> [count, first places]."""

    found: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        count, places = self.found.get(reason, (0, []))
        if len(places) < _SHOWN // 2:
            places = [*places, where]
        self.found[reason] = (count + 1, places)


def write(
    recipe: Recipe,
    base: Path,
    directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    progress: bool,
) -> dict[str, Any]:
    """Encode every row into the stores `directory`/train and, if the recipe has it, `directory`/validation.

    Returns the report: for each side its examples, tokens, rows and text_bytes (validation: None if there is none);
    rows_read, bad_rows and bad_rows_at; notes (reason -> count and first places); facts of the survey; max_length,
    packing; vocabulary and unknown_tokens.

    Raises:
        RecipeError: the tokenizer cannot do what the task needs.
        DataError: as `read_records`; or rows cannot be used; or a side has no row.
    """
    facts = survey(recipe, base)
    encoder = encoder_class(recipe.task)(recipe, tokenizer, facts)
    packing = recipe.settings.isolated
    columns = {"input_ids": "token"} | dict(encoder.columns)
    dtypes = {name: encoder.token_dtype if dtype == "token" else dtype for name, dtype in columns.items()}
    writers = {
        side: ExampleWriter(
            directory / side,
            dtypes if side == "train" else dtypes | {META: "u1"},
            length_columns=encoder.length_columns,
            max_length=recipe.data.max_length,
            packing=packing,
        )
        for side in ("train", "validation")
        if side == "train" or recipe.validated
    }
    text_bytes = dict.fromkeys(writers, 0)
    bad, notes, read, unknown = BadRows(), Notes(), 0, 0
    records = sided(recipe.data, _reader(recipe, base), row_key)
    augmenter = Augmenter(recipe, base, notes.add) if recipe.data.augment else None
    with text_progress(progress) as advance:
        while chunk := list(islice(records, _CHUNK_ROWS)):
            read += len(chunk)
            chunk = augmented(recipe, augmenter, chunk)
            for side, record, examples in _encoded(recipe, encoder, chunk, bad, notes):
                size = len(row_key(record).encode())
                text_bytes[side] += size
                advance(size)
                for example in examples:
                    unknown += _unknown(tokenizer, encoder, example)
                    if side == "train":
                        encoder.count(example)
                    meta = {META: meta_bytes(example.meta)} if side == "validation" else {}
                    writers[side].add({**example.columns, **meta})
    bad.stop_if_any(recipe)
    written = {side: writer.close() for side, writer in writers.items()}
    lost = [f"{bad.count} bad"] * bool(bad.count) + [f"{count} {reason}" for reason, (count, _) in notes.found.items()]
    check_sides(recipe, f"{read} rows were read" + "".join(f"; {each}" for each in lost), written)
    shown = ("examples", "tokens", "rows")
    sides = {side: {k: written[side][k] for k in shown} | {"text_bytes": text_bytes[side]} for side in written}
    return {
        "train": sides["train"],
        "validation": sides.get("validation"),
        "rows_read": read,
        "bad_rows": bad.count,
        "bad_rows_at": bad.first,
        "notes": notes.found,
        "facts": dict(encoder.facts),
        "max_length": recipe.data.max_length,
        "packing": packing,
        "vocabulary": len(tokenizer),
        "unknown_tokens": unknown,
    }


def _reader(recipe: Recipe, base: Path) -> Any:
    return partial(read_records, base=base, roles=encoder_class(recipe.task).required(recipe))


def augmented(recipe: Recipe, augmenter: Augmenter | None, chunk: list[tuple[str, Record]]) -> list[tuple[str, Record]]:
    """Every row, and behind each good training row its changed copies."""
    if augmenter is None:
        return chunk
    found, quiet = encoder_class(recipe.task), BadRows()
    good = [i for i, (side, record) in enumerate(chunk) if side == "train" and quiet.passes(found, recipe, record)]
    copies = dict(zip(good, augmenter.copies_of([chunk[i][1] for i in good]), strict=True))
    return [(side, each) for i, (side, record) in enumerate(chunk) for each in (record, *copies.get(i, ()))]


def _encoded(
    recipe: Recipe, encoder: RowEncoder, chunk: list[tuple[str, Record]], bad: BadRows, notes: Notes
) -> Iterator[tuple[str, Record, list[Example]]]:
    """The examples of each row of a chunk, whose texts are tokenized together."""
    usable: list[tuple[str, Record, int]] = []
    pieces: list[Any] = []
    for side, record in chunk:
        try:
            encoder.check(recipe, record)
            found = encoder.pieces(record)
        except RowError as error:
            bad.add(record, error)
            continue
        except LeftOut as reason:
            notes.add(str(reason), record.where)
            continue
        usable.append((side, record, len(found)))
        pieces += found
    encodings = encoder.encode(pieces) if pieces else []
    start = 0
    for side, record, count in usable:
        try:
            examples = encoder.build(record, encodings[start : start + count])
        except RowError as error:
            bad.add(record, error)
            examples = []
        except LeftOut as reason:
            notes.add(str(reason), record.where)
            examples = []
        start += count
        for note in {note for example in examples for note in example.notes}:
            notes.add(note, record.where)
        yield side, record, examples


def _unknown(tokenizer: PreTrainedTokenizerBase, encoder: RowEncoder, example: Example) -> int:
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id:
        return 0
    return sum(list(example.columns[name]).count(unknown) for name in encoder.length_columns)
