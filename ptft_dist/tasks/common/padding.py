"""Padding of rows of different lengths to one tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch


def pad(rows: Sequence[np.ndarray], value: float, multiple: int = 1) -> torch.Tensor:
    """Pad arrays of different lengths on the right: [B, T], T a multiple of `multiple`."""
    width = padded_width(map(len, rows), multiple)
    padded = np.full((len(rows), width), value, rows[0].dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


def padded_width(lengths: Iterable[int], multiple: int) -> int:
    """The longest length, rounded up to a multiple of `multiple`."""
    return -(-max(lengths) // multiple) * multiple


def pad_multiple(device: torch.device) -> int:
    """The multiple that row lengths are padded to: 1 on a CPU; 8 on an accelerator, for tensor cores."""
    return 1 if device.type == "cpu" else 8


def pad_id(pad_token_id: int | None) -> int:
    """The padding id for tasks whose networks never read padding; without a PAD token, any id works."""
    return 0 if pad_token_id is None else int(pad_token_id)
