"""The records of a recipe's sources, before the split into training and validation records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.encoder import Encoder, Side
from ptft_dist.data.formats import Record


class Records(Protocol):
    """Where the records of a recipe are read from. Several passes give the same records in the same order."""

    def of(self, side: Side, index: int) -> Iterator[Record]:
        """The records of source `index` of data.train or, for the side `validation`, of data.validation.

        Raises:
            DataError: a source cannot be read.
        """


class SourceRecords:
    """The records as the sources have them."""

    def __init__(self, recipe: Recipe, base: Path, encoder: type[Encoder]) -> None:
        self._recipe, self._base, self._encoder = recipe, base, encoder

    def of(self, side: Side, index: int) -> Iterator[Record]:
        """See `Records`."""
        sources = self._recipe.data.train if side == "train" else self._recipe.data.validation
        assert isinstance(sources, list)
        return self._encoder.read(self._recipe.settings, sources[index], self._base)
