"""The records of a recipe's sources, before the split into training and validation records."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Protocol

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.encoder import Encoder, Side
from ptft_dist.data.formats import Record
from ptft_dist.data.shards import Shard, shards_of


class Records(Protocol):
    """Where the records of a recipe are read from. Several passes give the same records in the same order."""

    @property
    def shards(self) -> list[Shard]:
        """The shards of the sources, in reading order. Raises DataError if a source is missing."""

    def of(self, side: Side, index: int) -> Iterator[Record]:
        """The records of source `index` of data.train or, for the side `validation`, of data.validation.

        Raises:
            DataError: a source cannot be read.
        """

    def of_shard(self, number: int) -> Iterator[Record]:
        """The records of a shard. Raises DataError if it cannot be read."""


class SourceRecords:
    """The records as the sources have them."""

    def __init__(self, recipe: Recipe, base: Path, encoder: type[Encoder]) -> None:
        self._recipe, self._base, self._encoder = recipe, base, encoder

    @cached_property
    def shards(self) -> list[Shard]:
        """See `Records`."""
        return shards_of(self._recipe, self._base)

    def of_shard(self, number: int) -> Iterator[Record]:
        """See `Records`."""
        return self._encoder.read(self._recipe.settings, self.shards[number].source, self._base)

    def of(self, side: Side, index: int) -> Iterator[Record]:
        """See `Records`."""
        sources = self._recipe.data.train if side == "train" else self._recipe.data.validation
        assert isinstance(sources, list)
        return self._encoder.read(self._recipe.settings, sources[index], self._base)
