"""Turns dropout off."""

from __future__ import annotations

import torch


def turn_off_dropout(model: torch.nn.Module) -> None:
    """Set every dropout probability of a network to 0, also those that attention applies as a function.

    The config keeps its values. Adapters that are added later have dropout of their own.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
