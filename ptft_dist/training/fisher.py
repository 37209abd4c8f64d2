"""The diagonal of the Fisher information of a network, estimated on old rows."""

from __future__ import annotations

from typing import Any

import torch

from ptft_dist.data.order import rows_at
from ptft_dist.data.store import Store
from ptft_dist.reporting.messages import progress
from ptft_dist.tasks.protocol import FISHER_EPOCH, Task

FISHER_VERSION = 2
"""Part of the cache key. Increase it when the same input gives another estimate than before."""


def fisher_diagonal(
    model: torch.nn.Module, task: Task, store: Store, count: int, seed: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """The diagonal of the empirical Fisher information of the trained parameters, by name, fp32 on the CPU.

    It is the mean over rows of the squared gradient of the row's log-likelihood, which is minus the summed loss of the
    row's labels, without dropout. Each row needs a forward and a backward pass of its own, since squares of single
    rows' gradients are summed. Memory on the device: weights, gradients and sums, 12 bytes per parameter.

    Args:
        model: complete and unwrapped, in fp32.
        count: number of rows, drawn without replacement by `seed`; at most all rows.
    """
    model.eval().to(device)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    sums = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    rows = rows_at(0, min(count, len(store)), len(store), seed)
    with progress("continual.ewc: estimating the Fisher information", len(rows), "rows") as shown:
        for row in rows.tolist():
            for name, gradient in _gradient(model, task, store, row, named, device).items():
                sums[name].addcmul_(gradient, gradient)
            shown.advance()
    return {name: (total / len(rows)).cpu().contiguous() for name, total in sums.items()}


def _gradient(
    model: torch.nn.Module, task: Task, store: Store, row: int, named: dict[str, Any], device: torch.device
) -> dict[str, torch.Tensor]:
    """The gradient of one row's loss. Parameters that the row does not use are missing."""
    batch = task.collate([store.row(row)], [(FISHER_EPOCH, row)])
    with torch.enable_grad():
        loss, *_ = task.loss(model, {name: tensor.to(device) for name, tensor in batch.inputs.items()})
        gradients = torch.autograd.grad(loss.sum(), list(named.values()), allow_unused=True)
    return {name: each for name, each in zip(named, gradients, strict=True) if each is not None}
