"""Backends: a network is complete on each process (one process, or DDP), or sharded by ZeRO or FSDP2.

They differ in how they reduce gradients, clip, step and store state. `Engine` uses one of them through `Backend`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ptft_dist.engine.state import Files


class Backend(Protocol):
    """The interface of a backend."""

    module: torch.nn.Module
    """The wrapped network."""
    optimizer: Optimizer
    """The optimizer with the parameter groups."""

    def __init__(
        self, accelerator: Accelerator, model: PreTrainedModel, module: torch.nn.Module, optimizer: Optimizer
    ) -> None:
        """Wrap `module`, which contains the network `model`, and the optimizer of its trained parameters."""

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """The context of one forward and backward pass. Gradients are reduced in the `last` one of an update only."""

    def backward(self, loss: torch.Tensor) -> None: ...

    def whole_weight(self, parameter: Any) -> torch.Tensor:
        """A trained parameter, complete and in fp32. All ranks must call this, as the three methods below."""

    def whole_gradient(self, parameter: Any) -> torch.Tensor:
        """Its gradient between the last backward pass and `step`, complete and in fp32; zeros if there is none."""

    def add_gradient(self, parameter: Any, gradient: torch.Tensor) -> None:
        """Add a complete gradient, equal on all ranks, to that of the loss, after the last backward pass."""

    def set_weight(self, parameter: Any, value: torch.Tensor) -> None:
        """Replace a trained parameter by a complete one, equal on all ranks, after `step`."""

    def clip(self, limit: float) -> torch.Tensor | None:
        """Clip the gradients and return their global 2-norm before clipping; None if `step` does this."""

    def step(self) -> float | None:
        """Update the weights and clear the gradients; return the gradient norm if `clip` returns None."""

    def whole_weights(self) -> contextlib.AbstractContextManager[None]:
        """The context in which each rank has the complete weights. All ranks must enter and leave it together."""

    def warm_up_backward(self, loss: torch.Tensor) -> bool:
        """Run a backward pass and discard the gradients; return whether to repeat it, with another forward pass."""

    def save(self, folder: Path) -> Files:
        """Write trained parameters, buffers and optimizer; return the hashes of the files that this rank hashed."""

    def load(self, folder: Path) -> None:
        """Load the files of `save`. Raises CheckpointError if other parameters were trained."""

    def full_state_dict(self) -> dict[str, Any]:
        """The unsharded state of the network, including frozen parameters, on rank 0; undefined on other ranks."""

    def trained_state_dict(self) -> dict[str, Any]:
        """The unsharded trained parameters and persistent buffers on rank 0; undefined on other ranks."""


def backend_class(kind: str) -> type[Backend]:
    """The class for single, ddp, zero1 to zero3, or fsdp2. DeepSpeed is imported only if used; that takes seconds."""
    if kind.startswith("zero"):
        from ptft_dist.engine.zero import Zero

        return Zero
    if kind == "fsdp2":
        from ptft_dist.engine.fsdp2 import Fsdp2

        return Fsdp2
    from ptft_dist.engine.whole import Whole

    return Whole


def why_not_loadable(saved_kind: str, saved_ranks: int, kind: str, ranks: int) -> str | None:
    """Why `ranks` processes under `kind` cannot load the state that other processes saved; None if they can.

    Unsharded state loads on any number of processes. ZeRO's shards load on the number of processes that wrote them.
    """
    if {saved_kind, kind} <= {"single", "ddp"} or saved_kind == kind == "fsdp2":
        return None
    if (saved_kind, saved_ranks) == (kind, ranks):
        return None
    return (
        f"contains the state of {saved_ranks} processes under {saved_kind}; this run has {ranks} under {kind}. Start "
        f"it as before ({saved_ranks} processes, {saved_kind}), or choose another run_dir and set model.path to an "
        "exported model"
    )
