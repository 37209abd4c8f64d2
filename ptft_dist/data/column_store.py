"""A store whose rows have one more column, which is computed after the rows are prepared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ptft_dist.data.store import Row, Store


class ColumnStore:
    """The rows of a store, with a column from a .npy file: fp32 [rows, width]."""

    def __init__(self, store: Store, name: str, file: Path) -> None:
        self.store, self.name, self.file = store, name, file
        self.path, self.tokens = store.path, store.tokens
        # A plain array over the memory map, because slicing an np.memmap takes a few microseconds longer.
        self._values = np.asarray(np.load(file, mmap_mode="r"))
        assert len(self._values) == len(store), file

    def __reduce__(self) -> tuple[type[ColumnStore], tuple[Store, str, Path]]:
        return ColumnStore, (self.store, self.name, self.file)

    def __len__(self) -> int:
        return len(self.store)

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return self.store.lengths(indices)

    def row(self, i: int) -> Row:
        row = self.store.row(i)
        return replace(row, columns=self._with(row.columns, self._values[i]))

    def largest(self, count: int) -> list[Row]:
        """The largest rows of the store; their values of the column are 0, because only the size matters."""
        zeros = np.zeros(self._values.shape[1], np.float32)
        return [replace(row, columns=self._with(row.columns, zeros)) for row in self.store.largest(count)]

    def _with(self, columns: Mapping[str, np.ndarray], values: np.ndarray) -> dict[str, np.ndarray]:
        return {**columns, self.name: values}
