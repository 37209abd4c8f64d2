"""A value head: a linear layer beside the output head, which reads the last hidden states."""

from __future__ import annotations

from typing import Any

import torch

VALUE_HEAD = "value_head"


def add_value_head(model: Any, hidden_size: int) -> None:
    """Add a trained linear layer [hidden_size -> 1] to a network. Its weights are 0, so all values are 0 at first."""
    head = torch.nn.Linear(hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    setattr(model, VALUE_HEAD, head)
