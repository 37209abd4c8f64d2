"""Several stores as one, in the order in which `order.Stream` numbers their rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ptft_dist.data.store import Row, Store


class MixedStore:
    """The rows of several stores: row r of store i has the number (rows of the stores before it) + r."""

    def __init__(self, stores: Sequence[Store], path: Path) -> None:
        """path: identifies this combination of stores. There is no such directory."""
        self.stores, self.path = stores, path
        self.tokens = sum(store.tokens for store in stores)
        self._ends = np.cumsum([len(store) for store in stores])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """The number of tokens in each row: int64, same shape as `indices`. Raises IndexError if out of range."""
        lengths, start = np.empty(indices.shape, np.int64), 0
        for i, (store, end) in enumerate(zip(self.stores, self._ends, strict=True)):
            # The first and the last store also get the indices that are out of range, and refuse them.
            mask = ((indices >= start) | (i == 0)) & ((indices < end) | (i == len(self.stores) - 1))
            lengths[mask] = store.lengths(indices[mask] - start)
            start = int(end)
        return lengths

    def row(self, i: int) -> Row:
        """The row with number i. Raises IndexError if it is out of range."""
        store = min(int(np.searchsorted(self._ends, i, side="right")), len(self.stores) - 1)
        return self.stores[store].row(i - (int(self._ends[store - 1]) if store else 0))

    def largest(self, count: int) -> list[Row]:
        """`count` rows as long as the longest rows of all stores."""
        rows = [row for store in self.stores for row in store.largest(count)]
        return sorted(rows, key=lambda row: -len(row.input_ids))[:count]
