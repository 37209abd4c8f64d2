"""Rows in memory, with the interface of a store on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ptft_dist.data.store import Row


class RowList:
    """A `Store` of rows that are not on disk."""

    path = Path()

    def __init__(self, rows: Sequence[Row], lengths: Sequence[int]) -> None:
        """lengths: number of tokens of each row."""
        self._rows, self._lengths = rows, np.array(lengths, np.int64)
        self.tokens = int(self._lengths.sum())

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self._lengths[indices]

    def row(self, i: int) -> Row:
        return self._rows[i]

    def largest(self, count: int) -> list[Row]:
        longest = np.argsort(-self._lengths, kind="stable")[:count]
        return [self._rows[i] for i in longest]
