"""One pass over the records of a shard: text steps, then the signatures that a deduplication needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ptft_dist.data.cache import writing
from ptft_dist.data.chunks import SidedRecord, chunked
from ptft_dist.data.cleaning.deduplication import Deduplication
from ptft_dist.data.cleaning.record_file import RecordWriter
from ptft_dist.data.cleaning.tally import Tally
from ptft_dist.data.cleaning.text_step import TextStep
from ptft_dist.data.cleaning.texts import compared_texts, texts_of, with_texts
from ptft_dist.data.encoder import Place, Side
from ptft_dist.data.formats import Record
from ptft_dist.data.workers import in_processes, worker_count
from ptft_dist.reporting.messages import Progress

RECORDS, SIGNATURES = "records.jsonl.zst", "signatures.npy"
EMPTIED = "no text is left"
_CHUNK_RECORDS = 2_000  # of a chunk: the size of texts inside of conversations is not counted


@dataclass(frozen=True)
class Named:
    """A step with its name and everything that affects it, as JSON."""

    name: str
    step: Any
    settings: Any


class _Done(NamedTuple):
    """The result of a worker for one chunk."""

    records: list[Record]
    tallies: list[Tally]
    signatures: np.ndarray | None


@dataclass(frozen=True)
class Stage:
    """Text steps, and at most one deduplication after them. `roles`: the columns with texts; `compared`: others whose
    values make records with equal texts different ones."""

    roles: tuple[str, ...]
    steps: tuple[Named, ...] = ()
    dedup: Named | None = None
    compared: tuple[str, ...] = ()

    @property
    def all(self) -> list[Named]:
        """All steps of the stage, in order."""
        return [*self.steps, *([self.dedup] if self.dedup else [])]

    def run(
        self, records: Iterable[Record], place: Place, directory: Path, shown: Progress, workers: int | None
    ) -> tuple[list[Tally], int]:
        """Write the records of a shard and their signatures into `directory`; return the counts of each step, and the
        number of records that were read.

        Raises:
            DataError: a record cannot be read or stored, or a custom step failed.
            PtftError: the cache cannot be written.
        """
        tallies, read = [Tally() for _ in self.steps], 0
        with writing(directory):
            writer = RecordWriter(directory / RECORDS)
        signatures: list[np.ndarray] = []
        chunks = chunked(((place, record) for record in records), _CHUNK_RECORDS)
        with closing(in_processes(chunks, self._chunk, worker_count() if workers is None else workers)) as results:
            for chunk, done in results:
                read += len(chunk)
                with writing(directory):
                    for record in done.records:
                        writer.add(record)
                for tally, more in zip(tallies, done.tallies, strict=True):
                    tally.add(more)
                if done.signatures is not None:
                    signatures.append(done.signatures)
                shown.advance(sum(len(text) for _, record in chunk for text in texts_of(record.values, self.roles)))
        with writing(directory):
            writer.close()
            if self.dedup is not None:
                none = self.dedup.step.sign([])
                np.save(directory / SIGNATURES, np.concatenate([none, *signatures]))
        return tallies, read

    def _chunk(self, chunk: Sequence[SidedRecord]) -> _Done:
        tallies = [Tally() for _ in self.steps]
        kept = [clean for place, record in chunk if (clean := self.clean(record, place.side, tallies)) is not None]
        if self.dedup is None:
            return _Done(kept, tallies, None)
        dedup: Deduplication = self.dedup.step
        texts = partial(compared_texts, others=self.compared) if dedup.by_record else texts_of
        units = [unit for record in kept for unit in dedup.units(texts(record.values, self.roles))]
        return _Done(kept, tallies, dedup.sign(units))

    def clean(self, record: Record, side: Side, tallies: Sequence[Tally]) -> Record | None:
        """The record after the text steps; None if one of them drops it. tallies: one for each step, counts it.

        Records of validation sources are not dropped by steps that only drop, so that evaluations stay comparable.
        """
        for named, tally in zip(self.steps, tallies, strict=True):
            step: TextStep = named.step
            if not step.edits and side == "validation":
                continue
            tally.read += 1
            try:
                after = (
                    _edited(record, step, tally, self.roles) if step.edits else _judged(record, step, tally, self.roles)
                )
            except Exception as error:
                error.add_note(f"{record.where}: in the step {named.name} of data.steps")
                raise
            if after is None:
                return None
            record = after
        return record


def _edited(record: Record, step: TextStep, tally: Tally, roles: Sequence[str]) -> Record | None:
    """The record with its texts changed; None if it is dropped."""
    changes: list[tuple[str, str]] = []
    notes: list[str] = []
    dropped: list[tuple[str, str]] = []

    def change(text: str) -> str:
        if not text.strip():
            return text
        cleaned = step(text)
        if cleaned.dropped is not None:
            dropped.append((cleaned.dropped, text))
        elif not cleaned.text.strip():
            dropped.append((EMPTIED, text))
        elif cleaned.text != text:
            changes.append((text, cleaned.text))
            notes.extend(cleaned.notes)
        return cleaned.text

    values = with_texts(record.values, roles, change)
    if dropped:
        tally.drop(record.where, *dropped[0])
        return None
    if not changes:
        return record
    tally.change(record.where, *changes[0], tuple(dict.fromkeys(notes)))
    return Record(values, record.where)


def _judged(record: Record, step: TextStep, tally: Tally, roles: Sequence[str]) -> Record | None:
    """The record; None if it is dropped."""
    text = "\n".join(texts_of(record.values, roles))
    if text.strip() and (reason := step(text).dropped) is not None:
        tally.drop(record.where, reason, text)
        return None
    return record


@dataclass
class Kept:
    """Which units of a shard a deduplication keeps, applied to its records while they are read."""

    dedup: Deduplication
    roles: tuple[str, ...]
    mask: np.ndarray
    """bool [units]."""
    originals: Mapping[int, str] = field(default_factory=dict)
    """Number of a dropped record -> the text that is kept instead, for the first ones."""
    tally: Tally = field(default_factory=Tally)

    def of(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records that are kept, without the parts that are not."""
        flags = iter(self.mask.tolist())
        for number, record in enumerate(records):
            self.tally.read += 1
            if self.dedup.by_record:
                if next(flags):
                    yield record
                else:
                    text = "\n".join(compared_texts(record.values, self.roles))
                    self.tally.drop(record.where, "duplicate", text, self.originals.get(number))
            elif (rest := self._without(record, flags)) is not None:
                yield rest

    def _without(self, record: Record, flags: Iterator[bool]) -> Record | None:
        texts = texts_of(record.values, self.roles)
        kept = [[next(flags) for _ in self.dedup.units([text])] for text in texts]
        if all(chain.from_iterable(kept)):
            return record
        shorter = [self.dedup.without(text, flags) for text, flags in zip(texts, kept, strict=True)]
        at = next(i for i, (one, other) in enumerate(zip(texts, shorter, strict=True)) if one != other)
        if any(text.strip() and not rest.strip() for text, rest in zip(texts, shorter, strict=True)):
            self.tally.drop(record.where, EMPTIED, texts[at])
            return None
        self.tally.change(record.where, texts[at], shorter[at], ())
        replaced = iter(shorter)
        return Record(with_texts(record.values, self.roles, lambda _: next(replaced)), record.where)
