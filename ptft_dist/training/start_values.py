"""Numbers about each row that the network gives before it is trained, such as a reference's log-probabilities."""

from __future__ import annotations

import numpy as np
import torch

from ptft_dist.data.order import split_update
from ptft_dist.data.store import Store
from ptft_dist.reporting.messages import progress
from ptft_dist.tasks.protocol import EVALUATION_EPOCH, Task

START_VERSION = 1
"""Part of the cache key. Increase it when the same input gives other values than before."""
MICRO_TOKENS = 2048
"""Padded size of a micro-batch. It does not follow the recipe, because the values are shared by recipes and splits."""


def start_values(
    model: torch.nn.Module, task: Task, store: Store, width: int, device: torch.device, precision: torch.dtype
) -> np.ndarray:
    """`task.start_values` of all rows of a store: fp32 [rows, width]. model: complete and unwrapped."""
    model.eval().to(device)
    rows = np.arange(len(store))
    values = np.empty((len(store), width), np.float32)
    parts = split_update(store.lengths(rows), 1, micro_tokens=MICRO_TOKENS)
    mixed = torch.autocast(device.type, precision, enabled=precision != torch.float32)
    with progress("computing the reference's log-probabilities", len(store), "rows") as shown, torch.no_grad(), mixed:
        for (part,) in parts:
            batch = task.collate([store.row(int(i)) for i in part], [(EVALUATION_EPOCH, int(i)) for i in part])
            found = task.start_values(model, {name: x.to(device) for name, x in batch.inputs.items()})
            values[part] = found.float().cpu().numpy()
            shown.advance(len(part))
    return values
