"""Penalties on changes of a pretrained network's parameters: L2-SP and elastic weight consolidation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ptft_dist.errors import DataError


class L2Sp:
    """strength / 2 x sum (parameter - start)^2 over the parameters that have a start value (Li et al. 2018)."""

    def __init__(self, strength: float, start: Mapping[str, torch.Tensor]) -> None:
        """start: parameter name -> its complete value in the old network, fp32, on any device."""
        self.strength, self.start = strength, start

    def term(self, name: str, parameter: torch.Tensor) -> torch.Tensor | None:
        start = self.start.get(name)
        if start is None:
            return None
        return self.strength / 2 * (parameter - start.to(parameter.device)).square().sum()


class Ewc:
    """strength / 2 x sum F x (parameter - start)^2 (Kirkpatrick et al. 2017, equation 3)."""

    def __init__(self, strength: float, start: Mapping[str, torch.Tensor], fisher: Mapping[str, torch.Tensor]) -> None:
        """start, fisher: parameter name -> complete tensors of its shape, fp32, on any device."""
        self.strength, self.start, self.fisher = strength, start, fisher

    def term(self, name: str, parameter: torch.Tensor) -> torch.Tensor | None:
        if name not in self.fisher:
            return None
        start, fisher = (each[name].to(parameter.device) for each in (self.start, self.fisher))
        return self.strength / 2 * (fisher * (parameter - start).square()).sum()


def read_tensors(path: Path, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a file. On a CPU they are memory-mapped, so the ranks of a machine share one copy.

    Raises:
        DataError: the file is damaged.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}). Delete {path.parent} and start again") from error
    return tensors if device.type == "cpu" else {name: tensor.to(device) for name, tensor in tensors.items()}
