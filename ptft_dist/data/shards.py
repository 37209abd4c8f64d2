"""The shards of a recipe's sources: groups of files that are processed independently, also by several machines.

Shards depend on the sources alone, so that the result does not depend on the number of processes or machines.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ptft_dist.config.recipe import Recipe, Source
from ptft_dist.data.encoder import Place, Side
from ptft_dist.data.sources import source_files
from ptft_dist.errors import RecipeError

SHARD_VARIABLE = "PTFT_SHARD_MB"
_SHARD_MB = 128.0


def shard_bytes() -> float:
    """Consecutive files of a source form a shard until they have this size. A larger file is a shard of its own.

    128 MB, or the environment variable PTFT_SHARD_MB. The prepared data do not depend on it.

    Raises:
        RecipeError: the variable is not a positive number.
    """
    given = os.environ.get(SHARD_VARIABLE)
    try:
        size = _SHARD_MB if given is None else float(given)
    except ValueError:
        size = 0.0
    if not 0 < size < float("inf"):
        raise RecipeError(f"{SHARD_VARIABLE}: {given!r} is not a size in MB. Set it to a positive number.")
    return size * 1e6


@dataclass(frozen=True)
class Shard:
    """A part of a source."""

    side: Side
    """`validation`: of a separate validation source."""
    index: int
    """Of the source, in data.train or data.validation."""
    number: int
    """Of this shard among those of the source."""
    source: Source
    """Reads the records of this shard."""

    @property
    def place(self) -> Place:
        """Where its records belong, before a split by fraction or folds."""
        return Place(self.side, self.index)


def shards_of(recipe: Recipe, base: Path) -> list[Shard]:
    """All shards, in reading order.

    A source that is not files, or that has a limit on its documents, is one shard.

    Raises:
        DataError: a source is missing.
    """
    validation = recipe.data.validation
    sides: dict[Side, list[Source]] = {
        "train": recipe.data.train,
        "validation": validation if isinstance(validation, list) else [],
    }
    return [
        Shard(side, index, number, part)
        for side, sources in sides.items()
        for index, source in enumerate(sources)
        for number, part in enumerate(_parts(source, base))
    ]


def _parts(source: Source, base: Path) -> list[Source]:
    if source.path is None or source.limit is not None:
        return [source]
    return [source.part(group) for group in _groups(source_files(source, base))]


def _groups(files: list[Path]) -> Iterator[list[Path]]:
    most, size = shard_bytes(), 0
    group: list[Path] = []
    for file in files:
        size += file.stat().st_size
        if group and size > most:
            yield group
            group, size = [], file.stat().st_size
        group.append(file)
    yield group
