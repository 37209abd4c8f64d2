"""The split of records into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

from ptft_dist.config.recipe import DataSection
from ptft_dist.data.chunks import SidedRecord
from ptft_dist.data.encoder import Place, Side
from ptft_dist.data.formats import Record
from ptft_dist.data.records import Records


def sided(data: DataSection, records: Records, key: Callable[[Record], str]) -> Iterator[SidedRecord]:
    """All records in order, each with its side and the index of its source.

    Args:
        key: the text whose hash decides the side in a split by fraction or folds. Equal texts get the same side.
    """
    for index in range(len(data.train)):
        for record in records.of("train", index):
            yield Place(side_of(data, key(record)), index), record
    if isinstance(data.validation, list):
        for index in range(len(data.validation)):
            for record in records.of("validation", index):
                yield Place("validation", index), record


def of_train(data: DataSection, records: Records, key: Callable[[Record], str]) -> Iterator[Record]:
    """The records of the training side only, for training a tokenizer or collecting labels."""
    for index in range(len(data.train)):
        for record in records.of("train", index):
            if side_of(data, key(record)) == "train":
                yield record


def side_of(data: DataSection, text: str) -> Side:
    """The side of a record of data.train with this key."""
    if data.folds is not None:
        return "validation" if int(_fraction(text) * data.folds) == data.fold else "train"
    share = data.validation if isinstance(data.validation, float) else 0.0
    return "validation" if share and _fraction(text) < share else "train"


def _fraction(text: str) -> float:
    """A hash of the text as a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
