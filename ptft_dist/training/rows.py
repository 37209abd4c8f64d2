"""The rows that a run trains on: one store, or several that are mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.mixed_store import MixedStore
from ptft_dist.data.mixture import periods_of
from ptft_dist.data.order import Period
from ptft_dist.data.prepare import Prepared
from ptft_dist.data.store import Store
from ptft_dist.errors import DataError

REPLAY = "continual.replay.data"


@dataclass(frozen=True)
class TrainingRows:
    """The store of the training rows, and how their order is drawn from it."""

    store: Store
    sizes: Sequence[int]
    """Number of rows of each store that `store` mixes."""
    periods: Sequence[Period] = (Period(0, (1,)),)
    """How they are mixed, see `order.Stream`."""
    end: int | None = None
    """The number of positions until a period of data.mixing has used up all of its sources; None: never."""


def training_rows(recipe: Recipe, prepared: Prepared, global_size: int | None) -> TrainingRows:
    """The rows of a run.

    Args:
        global_size: rows of each update; None if updates have different numbers of rows.

    Raises:
        DataError: a source of data.mixing has no rows.
    """
    continual, mixing, train = recipe.continual, recipe.data.mixing, prepared.train
    if mixing is not None:
        assert isinstance(train, MixedStore)
        sizes = [len(store) for store in train.stores]
        names = [source.name for source in recipe.data.train]
        for index, (size, name) in enumerate(zip(sizes, names, strict=True)):
            if not size:
                source = f"data.train.{index}" + (f" ({name})" if name else "")
                raise DataError(
                    f"{source}: no rows are left, so it cannot be mixed. Remove it, or correct what drops its records "
                    "(ptft data inspect shows it)."
                )
        return TrainingRows(train, sizes, *periods_of(mixing, names, sizes, global_size))
    if continual is None or continual.replay is None:
        return TrainingRows(train, [len(train)])
    old = prepared.old[REPLAY]
    mixed = MixedStore((train, old.train), train.path.parent / f"with-{old.fingerprint}")
    return TrainingRows(mixed, [len(train), len(old.train)], (Period(0, continual.replay.shares),))
