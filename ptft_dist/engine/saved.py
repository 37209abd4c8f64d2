"""Reads the trained weights of a checkpoint of any backend in one process, without a process group or an optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ptft_dist.engine.parameters import first_names, require_stored, stored_tensors
from ptft_dist.engine.state import WEIGHTS
from ptft_dist.errors import CheckpointError


class SavedState:
    """The methods of Engine that are needed to build one network, load its weights from a checkpoint and export it."""

    kind, is_main, rank, world_size = "single", True, 0, 1
    device, trained_dtype = torch.device("cpu"), torch.float32
    model: torch.nn.Module

    @contextlib.contextmanager
    def building(self, pretrained: bool) -> Iterator[None]:  # noqa: ARG002
        yield

    @contextlib.contextmanager
    def whole(self, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:  # noqa: ARG002
        yield

    def barrier(self) -> None: ...

    def load(self, model: torch.nn.Module, folder: Path, kind: str) -> None:
        """Load the files of Engine.save_state, whose hashes were verified, into a network that is not wrapped.

        Args:
            kind: the backend that wrote them.

        Raises:
            CheckpointError: they contain other parameters than those that the network trains, or code.
        """
        if kind.startswith("zero"):
            from ptft_dist.engine.zero_files import read_module

            weights = read_module(folder / "deepspeed")
        elif (folder / WEIGHTS).is_file():
            weights = load_file(folder / WEIGHTS)
        else:
            raise CheckpointError(f"{folder} has no {WEIGHTS}: it was written by another version of ptft")
        require_stored({name: tensor.shape for name, tensor in weights.items()}, model, folder)
        targets, first = stored_tensors(model), first_names(model)
        with torch.no_grad():
            for name, tensor in weights.items():
                targets[first.get(name, name)].copy_(tensor)
        self.model = model

    def full_state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def trained_state_dict(self) -> dict[str, Any]:
        return stored_tensors(self.model)
