"""Changed copies of labelled texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.cache import HashMemo
from ptft_dist.data.formats import Record


class Augmenter:
    """Makes the copies that data.augment asks for: a pure function of the seed and the row."""

    def __init__(self, recipe: Recipe, base: Path) -> None:
        self.recipe, self.base = recipe, base

    def copies(self, record: Record) -> Iterator[Record]:
        raise NotImplementedError


def augmentation_contents(recipe: Recipe, base: Path, memo: HashMemo) -> list[Any]:
    """Settings and contents of the files that decide the copies."""
    raise NotImplementedError
