"""Rules that change trained parameters after an update, besides the optimizer."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch


class WeightRule(Protocol):
    """Changes some trained parameters after each update, from their values and gradients."""

    names: Collection[str]
    """The parameters that the rule reads, as the network names them."""

    def after_step(
        self, weights: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The new values of the parameters that change.

        All ranks call this with the same values: complete tensors in fp32, on the device.

        Args:
            weights: the parameters after the update, by name, in the order of the network.
            gradients: the clipped gradients of this update.
        """
