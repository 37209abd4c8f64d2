"""Losses that several tasks share. They are summed over targets; a target of -100 counts nothing.

None of them waits for the device: where targets stand is known on the CPU, when a batch is collated.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from ptft_dist.tasks.protocol import IGNORE

POSITIONS = "target_positions"
"""The batch input that says where targets stand: int64 [P], indices into the flattened targets."""


def network_inputs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inputs that the network itself takes: all but targets and where they stand."""
    return {name: x for name, x in inputs.items() if not name.startswith("targets") and name != POSITIONS}


def target_positions(targets: np.ndarray) -> torch.Tensor:
    """int64 [P]: where targets [...] are not -100, as indices into the flattened array."""
    return torch.from_numpy(np.flatnonzero(targets != IGNORE))


def loss_at_positions(
    logits: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy summed over the targets, how many are predicted, and how many there are: three scalars.

    Args:
        logits: [..., V]; only those at `positions` are copied to fp32.
        targets: [...], -100 where there is none.
        positions: int64 [P], indices into the flattened targets; None: all of them.
    """
    flat, labels = logits.flatten(0, -2), targets.flatten()
    if positions is not None:
        flat, labels = flat.index_select(0, positions), labels.index_select(0, positions)
    flat = flat.float()
    counted = labels != IGNORE
    right = ((flat.argmax(-1) == labels) & counted).sum()
    return F.cross_entropy(flat, labels, ignore_index=IGNORE, reduction="sum"), right, counted.sum()


def perplexity(loss: float) -> float:
    """exp(loss), with the exponent limited to what a float holds."""
    return math.exp(min(loss, 700.0))
