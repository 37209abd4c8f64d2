"""The learning rate as a pure function of the update number. It has no state, so nothing is saved or restored."""

from __future__ import annotations

import math

from ptft_dist.config.recipe import OptimSection

WSD_DECAY = 0.2
POLYNOMIAL_POWER = 2.0


def warmup_steps(optim: OptimSection, total_steps: int) -> int:
    """`optim.warmup` as a number of updates; a value below 1 is a fraction of `total_steps`."""
    return round(optim.warmup * total_steps) if optim.warmup < 1 else int(optim.warmup)


def lr_at(step: int, optim: OptimSection, total_steps: int) -> float:
    """The learning rate of update `step` (from 0) in a run of `total_steps` updates.

    Warmup is linear: update s of W has (s + 1) / W of the peak, so that no update has a rate of zero. Then linear,
    cosine, polynomial and wsd decay to `min_lr_ratio` of the peak at `total_steps`; inverse_sqrt is sqrt(W / s)
    (Vaswani et al. 2017, equation 3), scaled to the peak at the end of the warmup.
    """
    warmup = warmup_steps(optim, total_steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    low = optim.min_lr_ratio
    match optim.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = low + (1 - low) * (1 - progress)
        case "cosine":
            share = low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
        case "polynomial":
            share = low + (1 - low) * (1 - progress) ** (optim.power or POLYNOMIAL_POWER)
        case "inverse_sqrt":
            share = math.sqrt(max(1, warmup) / max(1, step))
            share = min(1.0, share)
        case "wsd":
            decay = WSD_DECAY if optim.decay is None else optim.decay
            # A decay that overlaps the warmup begins at its end, so that the rate does not jump.
            decay_steps = max(1, min(round(decay * total_steps), total_steps - warmup))
            left = min(1.0, (total_steps - step) / decay_steps)
            share = low + (1 - low) * left
    return optim.lr * share
