"""Which side of a run a record is on: training or validation."""

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
    """Everything that the recipe's sources hold, in its order, each with "train" or "validation".

    Args:
        key: the text that decides where a share or a fold is cut: equal texts fall on the same side.
    """
    for source in data.train:
        for item in read(source):
            yield _side(data, key(item)), item
    if isinstance(data.validation, list):
        for source in data.validation:
            for item in read(source):
                yield "validation", item


def of_train(data: DataSection, read: Callable[[Source], Iterator[T]], key: Callable[[T], str]) -> Iterator[T]:
    """The training side alone: what a tokenizer or a list of labels may be learned from."""
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
    """A number in [0, 1) that depends on the text alone: equal documents fall on the same side of a split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64
