"""Which stores the records of a recipe are written to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.encoder import Place, Side

TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Layout:
    """The names of the stores: `train`, or with data.mixing one for each source, train-000; and `validation`."""

    sources: int
    """Number of training sources."""
    by_source: bool
    """Each training source has a store of its own."""
    validated: bool
    """There are validation records."""

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The layout of a recipe."""
        return cls(len(recipe.data.train), recipe.data.mixing is not None, recipe.validated)

    @property
    def train_names(self) -> list[str]:
        """The stores of training records."""
        return [f"{TRAIN}-{index:03}" for index in range(self.sources)] if self.by_source else [TRAIN]

    @property
    def stores(self) -> dict[str, Side]:
        """Name -> side of all stores."""
        sides: dict[str, Side] = dict.fromkeys(self.train_names, "train")
        return sides | ({VALIDATION: "validation"} if self.validated else {})

    def name(self, place: Place) -> str:
        """The store of a record."""
        if place.side == "validation":
            return VALIDATION
        return self.train_names[place.source] if self.by_source else TRAIN
