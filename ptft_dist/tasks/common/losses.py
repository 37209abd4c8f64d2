"""Losses shared by several tasks, summed over targets. The target -100 means no target.

They do not synchronize with the device: the positions of targets are computed on the CPU when a batch is collated.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from ptft_dist.tasks.protocol import IGNORE

POSITIONS = "target_positions"
"""Name of the batch input with the positions of targets: int64 [P], indices into the flattened targets."""


def network_inputs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs of the network: all batch inputs except targets and their positions."""
    return {name: x for name, x in inputs.items() if not name.startswith("targets") and name != POSITIONS}


def target_positions(targets: np.ndarray) -> torch.Tensor:
    """The positions of targets [...] that are not -100: int64 [P], indices into the flattened array."""
    return torch.from_numpy(np.flatnonzero(targets != IGNORE))


def row_losses(losses: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """LossOut.row_losses: the sum over the targets of each row, and their number: fp32 [B, 2].

    Args:
        losses: of each target [B, ...], 0 without one.
        targets: [B, ...], -100 or NaN without a target.
    """
    counted = ~targets.isnan() if targets.is_floating_point() else targets != IGNORE
    return torch.stack([losses.flatten(1).sum(1), counted.flatten(1).sum(1).to(losses.dtype)], 1)


def position_row_losses(
    logits: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None = None
) -> torch.Tensor:
    """`row_losses` of the cross-entropy at positions; arguments as of `loss_at_positions`, targets [B, ...]."""
    labels, rows = targets.flatten(), torch.arange(targets.numel(), device=targets.device) // targets[0].numel()
    flat = logits.flatten(0, -2)
    if positions is not None:
        flat, labels, rows = (x.index_select(0, positions) for x in (flat, labels, rows))
    losses = F.cross_entropy(flat.float(), labels, ignore_index=IGNORE, reduction="none")
    pairs = torch.stack([losses, (labels != IGNORE).float()], 1)
    return pairs.new_zeros(len(targets), 2).index_add_(0, rows, pairs)


def loss_at_positions(
    logits: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed cross-entropy, number of correct predictions, and number of targets: three scalars.

    Args:
        logits: [..., V]; only those at `positions` are copied to fp32.
        targets: [...], -100 without a target.
        positions: int64 [P], indices into the flattened targets; None: all positions.
    """
    flat, labels = logits.flatten(0, -2), targets.flatten()
    if positions is not None:
        flat, labels = flat.index_select(0, positions), labels.index_select(0, positions)
    flat = flat.float()
    counted = labels != IGNORE
    right = ((flat.argmax(-1) == labels) & counted).sum()
    return F.cross_entropy(flat, labels, ignore_index=IGNORE, reduction="sum"), right, counted.sum()


def perplexity(loss: float) -> float:
    """exp(loss), with the exponent limited so that the result is finite."""
    return math.exp(min(loss, 700.0))
