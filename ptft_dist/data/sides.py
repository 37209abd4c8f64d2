"""The split of records into training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from ptft_dist.config.recipe import DataSection, Source
from ptft_dist.data.encoder import Side

T = TypeVar("T")


def sided(
    data: DataSection, read: Callable[[Source], Iterator[T]], key: Callable[[T], str]
) -> Iterator[tuple[Side, T]]:
    """All items of the recipe's sources in order, each with its side ("train" or "validation").

    Args:
        key: the text whose hash decides the side in a split by fraction or folds. Equal texts get the same side.
    """
    for source in data.train:
        for item in read(source):
            yield _side(data, key(item)), item
    if isinstance(data.validation, list):
        for source in data.validation:
            for item in read(source):
                yield "validation", item


def of_train(data: DataSection, read: Callable[[Source], Iterator[T]], key: Callable[[T], str]) -> Iterator[T]:
    """The items of the training side only, for training a tokenizer or collecting labels."""
    for source in data.train:
        for item in read(source):
            if _side(data, key(item)) == "train":
                yield item


def _side(data: DataSection, text: str) -> Side:
    if data.folds is not None:
        return "validation" if int(_fraction(text) * data.folds) == data.fold else "train"
    share = data.validation if isinstance(data.validation, float) else 0.0
    return "validation" if _fraction(text) < share else "train"


def _fraction(text: str) -> float:
    """A hash of the text as a number in [0, 1)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
