"""Rows of different lengths, padded to one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def pad(rows: Sequence[np.ndarray], value: float, multiple: int = 1) -> torch.Tensor:
    """Arrays of different lengths, filled up on the right: [B, T], T a multiple of `multiple`."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    padded = np.full((len(rows), width), value, rows[0].dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


def pad_multiple(device: torch.device) -> int:
    """Tensor cores want multiples of 8."""
    return 1 if device.type == "cpu" else 8
