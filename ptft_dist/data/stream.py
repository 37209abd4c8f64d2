"""The data stream: records -> training/validation split -> steps -> encoder -> writers.

The records are those of the sources, or what data.steps made of them (`cleaning/`). The split comes before the steps
here, so that an augmented copy of a row is on the same side as the row. Chunks of records are encoded in several
threads or processes (workers.py) and written in reading order. So the bytes of the stores do not depend on the number
of workers or the size of the chunks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.cache import HashMemo, writing
from ptft_dist.data.chunks import SidedRecord, chunked
from ptft_dist.data.encoder import Encoder, Example, Outcome, Place, RowError, Writer
from ptft_dist.data.formats import Record
from ptft_dist.data.layout import VALIDATION, Layout
from ptft_dist.data.records import Records
from ptft_dist.data.report import BadRows, Notes, Report, RowTally, SideReport, SourceReport, StepReport, sum_of_sides
from ptft_dist.data.sides import of_train
from ptft_dist.data.store import TokenStore
from ptft_dist.data.tokenizer import learnable
from ptft_dist.data.workers import in_processes, in_threads, worker_count
from ptft_dist.errors import DataError
from ptft_dist.reporting.messages import progress


class Step(Protocol):
    """A change of the stream between the split and the encoder."""

    name: str
    notes: Notes
    """Counts of the changes, for the report."""

    def fingerprint(self, memo: HashMemo) -> Any:
        """Everything that affects the changes, as JSON: settings and contents of files."""

    def apply(self, chunk: Sequence[SidedRecord]) -> list[SidedRecord]:
        """The records that replace those of the chunk, in order."""


# --- without a tokenizer ---------------------------------------------------------------------------------------------


def training_records(recipe: Recipe, source: Records, encoder: type[Encoder], bad: RowTally) -> Iterator[Record]:
    """The valid records of the training side, without the copies that steps add. `bad` counts invalid ones."""
    for record in of_train(recipe.data, source, encoder.key):
        try:
            encoder.check(recipe.settings, record)
        except RowError as problem:
            bad.add(record.where, problem)
        else:
            bad.good(record.where)
            yield record


def training_texts(recipe: Recipe, source: Records, encoder: type[Encoder]) -> Iterator[str]:
    """The texts of the training side, for training a tokenizer.

    Raises:
        DataError: see `Encoder.read`; or there are bad rows, and the recipe does not skip them.
    """
    bad = RowTally()
    records = training_records(recipe, source, encoder, bad)
    yield from learnable((text, record.where) for record in records for text in encoder.texts(recipe.settings, record))
    stop_if_any(recipe, bad)


def take_survey(recipe: Recipe, source: Records, encoder: type[Encoder]) -> dict[str, Any]:
    """Properties of the training records that the task needs before encoding, see `Encoder.survey_of`.

    Raises:
        DataError: see `training_texts` and `Encoder.survey_of`.
    """
    if not encoder.surveys:
        return {}
    bad = RowTally()
    survey = encoder.survey_of(recipe.settings, training_records(recipe, source, encoder, bad), recipe.train.seed)
    stop_if_any(recipe, bad)
    return survey


def stop_if_any(recipe: Recipe, bad: RowTally) -> None:
    """Stop at bad rows unless the recipe skips them.

    Raises:
        DataError: there are bad rows, and the recipe does not skip them.
    """
    if bad.count and recipe.data.bad_rows == "stop":
        raise DataError(bad.message(skippable=True))


# --- with the tokenizer ----------------------------------------------------------------------------------------------


def write(
    recipe: Recipe,
    records: Iterable[SidedRecord],
    directory: Path,
    encoder: Encoder,
    steps: Sequence[tuple[Step, str]] = (),
    *,
    workers: int | None = None,
) -> Report:
    """Encode records into the stores `directory`/train and, with validation data, `directory`/validation.

    Args:
        steps: the steps with their fingerprints (for the report).
        workers: number of encoding processes; None: see `worker_count`.

    Raises:
        DataError: see `Encoder.read`; or there are bad rows and the recipe does not skip them.
        PtftError: the cache cannot be written.
    """
    layout = Layout.of(recipe)
    with writing(directory):
        writers = {name: encoder.writer(directory / name, side) for name, side in layout.stores.items()}
    written = _Written(encoder, layout, writers, directory)
    read = _Counted(records)
    chunks: Iterator[list[SidedRecord]] = chunked(read, encoder.chunk_records)
    for step, _ in steps:
        chunks = map(step.apply, chunks)
    with progress("encoding", unit="bytes") as shown, closing(_encoded(chunks, encoder, workers)) as results:
        for chunk, encoded in results:
            for item, outcome in zip(chunk, encoded.outcomes, strict=True):
                shown.advance(written.add(item, outcome))
            encoder.survey |= encoded.discovered
    stop_if_any(recipe, written.bad)
    train, validation = by_side(layout, written.close())
    return Report(
        reads=encoder.reads,
        read=read.count,
        train=train,
        validation=validation,
        sources=written.sources,
        steps=[StepReport(step.name, name, step.notes.entries) for step, name in steps],
        bad_rows=BadRows(written.bad.count, written.bad.first),
        dropped=written.dropped.entries,
        notes=written.notes.entries,
        survey=encoder.survey,
        max_length=encoder.max_length,
        packing=bool(getattr(recipe.settings, "packing", False)),
        vocabulary=len(encoder.tokenizer),
        unknown_tokens=written.unknown_tokens,
        unit="document" if issubclass(encoder.store, TokenStore) else "example",
        warnings=encoder.warnings(),
    )


class _Counted:
    """Counts the items of a stream while it is read."""

    def __init__(self, records: Iterable[SidedRecord]) -> None:
        self._records, self.count = records, 0

    def __iter__(self) -> Iterator[SidedRecord]:
        for item in self._records:
            self.count += 1
            yield item


class _Encoded(NamedTuple):
    """The result of a worker for one chunk."""

    outcomes: list[Outcome]
    discovered: dict[str, Any]


def _encoded(
    chunks: Iterator[list[SidedRecord]], encoder: Encoder, workers: int | None
) -> Generator[tuple[list[SidedRecord], _Encoded], None, None]:
    """The chunks with their encoded records, in order."""

    def encode(chunk: list[tuple[Place, Record | Outcome]]) -> _Encoded:
        outcomes = iter(encoder.outcomes([record for _, record in chunk if isinstance(record, Record)]))
        all_outcomes = [item if isinstance(item, Outcome) else next(outcomes) for _, item in chunk]
        kept = [
            outcome.without_meta() if place.side == "train" and not encoder.keeps_meta else outcome
            for (place, _), outcome in zip(chunk, all_outcomes, strict=True)
        ]
        return _Encoded(kept, encoder.discovered)

    waiting: list[list[SidedRecord]] = []  # chunks that the workers are encoding

    def admitted() -> Iterator[list[tuple[Place, Record | Outcome]]]:
        for chunk in chunks:
            waiting.append(chunk)
            yield [(place, _admitted(encoder, record)) for place, record in chunk]

    if encoder.uses_processes:
        results = in_processes(admitted(), encode, worker_count() if workers is None else workers)
    else:
        results = in_threads(admitted(), encode)
    with closing(results):
        for _, encoded in results:
            yield waiting.pop(0), encoded


def _admitted(encoder: Encoder, record: Record) -> Record | Outcome:
    try:
        encoder.admit(record)
    except RowError as problem:
        return Outcome(problem=str(problem))
    return record


class _Written:
    """Writes outcomes to the stores in order, and counts them."""

    def __init__(self, encoder: Encoder, layout: Layout, writers: dict[str, Writer], directory: Path) -> None:
        self._encoder, self._layout, self._writers, self._directory = encoder, layout, writers, directory
        self._text_bytes: Counter[str] = Counter()
        self.sources: dict[str, SourceReport] = {}
        self.bad, self.dropped, self.notes = RowTally(), Notes(), Notes()
        self.unknown_tokens = 0
        self._number = 0

    def add(self, item: SidedRecord, outcome: Outcome) -> int:
        """Write the examples of a record; return the size of its text in bytes."""
        place, record = item
        if outcome.problem is not None:
            self.bad.add(record.where, outcome.problem)
            return 0
        self.bad.good(record.where)
        if outcome.dropped is not None:
            self.dropped.add(outcome.dropped, record.where)
            return 0
        for note in dict.fromkeys(note for example in outcome.examples for note in example.notes):
            self.notes.add(note, record.where)
        self._number += 1
        self.unknown_tokens += outcome.unknown_tokens
        name = self._layout.name(place)
        for example in outcome.examples:
            if place.side == "train":
                self._encoder.count(example)
            with writing(self._directory):
                self._writers[name].add(self._numbered(example))
        texts = self._encoder.texts(self._encoder.settings, record)
        size_bytes = sum(len(text.encode()) for text in texts)
        self._text_bytes[name] += size_bytes
        tokens = sum(map(self._encoder.length, outcome.examples))
        own = SourceReport(1, len(outcome.examples), tokens, size_bytes)
        source = f"{place.side}[{place.source}]"
        self.sources[source] = self.sources[source].plus(own) if source in self.sources else own
        return size_bytes

    def _numbered(self, example: Example) -> Example:
        key = self._encoder.numbered
        return example if key is None else replace(example, meta={key: self._number, **example.meta})

    def close(self) -> dict[str, SideReport]:
        """Complete the stores; name -> report of a store."""
        with writing(self._directory):
            closed = {name: writer.close() for name, writer in self._writers.items()}
        for writer in self._writers.values():
            self.notes.merge(writer.notes)
        return {name: side_report(summary, self._text_bytes[name]) for name, summary in closed.items()}


def side_report(summary: Mapping[str, Any], text_bytes: int) -> SideReport:
    """The report of a store. summary: the contents of its store.json."""
    return SideReport(
        examples=summary["documents"] if "documents" in summary else summary["examples"],
        rows=summary["rows"],
        tokens=summary["tokens"],
        text_bytes=text_bytes,
        dropped_tokens=summary.get("dropped_tokens", 0),
    )


def by_side(layout: Layout, stores: Mapping[str, SideReport]) -> tuple[SideReport, SideReport | None]:
    """The reports of training and validation, from those of the stores."""
    return sum_of_sides([stores[name] for name in layout.train_names]), stores.get(VALIDATION)


def check_sides(recipe: Recipe, report: Report) -> None:
    """Raises DataError if a side has no rows."""
    empty = [name for name, side in report.sides.items() if not side.rows]
    if not empty:
        return
    losses = [f"{report.bad_rows.count} bad"] * bool(report.bad_rows.count)
    losses += [f"{times} {reason}" for step in report.steps for reason, (times, _) in step.dropped.items()]
    losses += [f"{times} {reason}" for reason, (times, _) in report.dropped.items()]
    read = f"{report.read} {report.reads}s were read" + "".join(f"; {each}" for each in losses)
    if recipe.data.folds is not None:
        remedy = (
            f"Folds (data.folds: {recipe.data.folds}) are chosen by a hash of whole rows. Use fewer folds or more data."
        )
    elif isinstance(recipe.data.validation, float):
        remedy = (
            f"A fraction (data.validation: {recipe.data.validation}) is chosen by a hash of whole documents or rows. "
            "Use a larger fraction, smaller documents (data.train[0].document: paragraph), more data, or separate "
            "validation sources."
        )
    elif any("data.max_length" in reason for reason in report.dropped):
        remedy = f"Raise data.max_length ({recipe.data.max_length}), or check the sources."
    else:
        remedy = "Check the sources."
    raise DataError(f"data: no rows for {' and '.join(empty)}: {read}. {remedy}")
