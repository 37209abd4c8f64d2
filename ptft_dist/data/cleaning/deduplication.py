"""The interface of steps that compare all records with each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np

from ptft_dist.config.cleaning import ExactDedupStep, NearDedupStep


class Deduplication(Protocol):
    """A step that keeps the first of equal or similar units; a unit is a record, or a part of its texts.

    Each shard is signed on its own. Then one process finds the original of each unit among the signatures of all.
    """

    libraries: ClassVar[tuple[str, ...]]
    """Libraries whose versions affect the results, by their names on PyPI."""
    by_record: bool
    """The unit is a whole record."""

    def units(self, texts: Sequence[str]) -> list[str]:
        """The units of the texts of a record, in order. A record as a whole is one unit, empty without any text."""

    def sign(self, units: Sequence[str]) -> np.ndarray:
        """The signatures of units: [N, width], unsigned integers."""

    def originals(self, signatures: Sequence[np.ndarray]) -> np.ndarray:
        """For each unit of all shards, the first unit that it repeats, or itself: int64 [N].

        Units are counted through all shards. signatures: of each shard, in the order of precedence.
        """

    def without(self, text: str, kept: Sequence[bool]) -> str:
        """A text without the units that are not kept, if the unit is a part of a text. kept: for each of its units."""


def deduplication(settings: ExactDedupStep | NearDedupStep) -> Deduplication:
    """The step of these settings."""
    if isinstance(settings, ExactDedupStep):
        from ptft_dist.data.cleaning.exact_dedup import ExactDedup

        return ExactDedup(settings)
    from ptft_dist.data.cleaning.near_dedup import NearDedup

    return NearDedup(settings)
