"""How a network is spread over processes: whole on each (one process, or DDP), in ZeRO's shards, or in FSDP2's.

The three differ in how they exchange gradients, clip, step and store. `Engine` uses one of them through `Backend`.
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
    """module: the wrapped network, to be called; optimizer: what has the parameter groups."""

    module: torch.nn.Module
    optimizer: Optimizer

    def __init__(
        self, accelerator: Accelerator, model: PreTrainedModel, module: torch.nn.Module, optimizer: Optimizer
    ) -> None:
        """Wrap `module`, which contains the network `model`, and the optimizer of its trained parameters."""

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around one forward and backward; gradients are exchanged in the `last` of an update only."""

    def backward(self, loss: torch.Tensor) -> None: ...

    def clip(self, limit: float) -> torch.Tensor | None:
        """Clip, and return the global 2-norm of the gradient before; None where `step` does both."""

    def step(self) -> float | None:
        """Move the weights and clear the gradients; return the norm of the gradient where `clip` did not."""

    def warm_up_backward(self, loss: torch.Tensor) -> None:
        """Go backward once and forget the gradients."""

    def save(self, folder: Path) -> Files:
        """Write trained parameters, buffers and optimizer; return the hashes of the files that this rank hashed."""

    def load(self, folder: Path) -> None:
        """The inverse of `save`. Raises CheckpointError if other parameters were trained."""

    def full_state_dict(self) -> dict[str, Any]:
        """The state of the network, frozen parameters too, whole, on rank 0; undefined on the other ranks."""


def backend_class(kind: str) -> type[Backend]:
    """The class for single, ddp, zero1 to zero3, or fsdp2. DeepSpeed takes seconds to import: only where it is used."""
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

    State that is whole in its files loads on any number of processes; shards of ZeRO load on as many as wrote them.
    """
    if {saved_kind, kind} <= {"single", "ddp"} or saved_kind == kind == "fsdp2":
        return None
    if (saved_kind, saved_ranks) == (kind, ranks):
        return None
    return (
        f"holds the state of {saved_ranks} processes under {saved_kind}; this run has {ranks} under {kind}. Start it "
        f"as before ({saved_ranks} processes, {saved_kind}), or choose another run_dir and begin with model.path set "
        "to an exported model"
    )
