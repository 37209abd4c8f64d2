"""How a network is spread over processes: whole on each (one process, or DDP), ZeRO's shards, or FSDP2's shards.

The three differ in how they exchange gradients, clip, step and store; `Engine` asks one of them and knows no more.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from ptft_dist.engine.state import read_optimizer, write_optimizer
from ptft_dist.errors import ShardWriteError

WEIGHTS = "model.safetensors"


class Backend(Protocol):
    """module: the wrapped network, to be called; optimizer: what has the parameter groups."""

    module: torch.nn.Module
    optimizer: Optimizer

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around one forward and backward; gradients are exchanged in the `last` of an update only."""

    def backward(self, loss: torch.Tensor) -> None: ...

    def clip(self, limit: float) -> torch.Tensor | None:
        """The gradient's global 2-norm before clipping; None if it is known after the step only."""

    def step(self) -> float | None:
        """Move the weights and clear the gradients; the gradient's norm if `clip` could not tell it."""

    def warm_up_backward(self, loss: torch.Tensor) -> None:
        """Go backward once and forget the gradients."""

    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...

    def full_state_dict(self) -> dict[str, Any]:
        """The network's own state, whole, on rank 0; what the other ranks get is not to be used."""


class Whole:
    """Every process holds the whole network and optimizer. Rank 0 stores them."""

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel, module: torch.nn.Module, optimizer: Any):
        module.to(accelerator.device)
        self.accelerator, self.model, self.scaler = accelerator, model, accelerator.scaler
        self.module, prepared = accelerator.prepare(module, optimizer)
        self.optimizer: Optimizer = prepared.optimizer

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        if isinstance(self.module, DistributedDataParallel) and not last:
            with self.module.no_sync():
                yield
        else:
            yield

    def backward(self, loss: torch.Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def clip(self, limit: float) -> torch.Tensor | None:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def step(self) -> float | None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return None

    def warm_up_backward(self, loss: torch.Tensor) -> None:
        (loss * 0.0).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        if self.accelerator.is_main_process:
            save_model(self.model, str(folder / WEIGHTS))
            scaler = {} if self.scaler is None else {"scaler": self.scaler.state_dict()}
            write_optimizer(folder, self.optimizer.state_dict(), scaler)

    def load(self, folder: Path) -> None:
        device = _load_device(self.accelerator)
        load_model(self.model, folder / WEIGHTS, strict=True, device=device)
        state, extra = read_optimizer(folder, device)
        self.optimizer.load_state_dict(state)
        if self.scaler is not None:
            self.scaler.load_state_dict(extra["scaler"])

    def full_state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()


class Zero:
    """DeepSpeed. It steps by hand here, after all ranks have agreed that the loss is finite; each rank stores its
    shards, and only the same number of ranks can load them."""

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel, module: torch.nn.Module, optimizer: Any):
        self.accelerator, self.model = accelerator, model
        self.module, prepared = accelerator.prepare(module, optimizer)
        self.optimizer: Optimizer = prepared.optimizer
        if type(self.module).__name__ != "DeepSpeedEngine":
            raise RuntimeError(f"DeepSpeed was asked for, but the network became a {type(self.module).__name__}")

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.module.backward(loss, scale_wrt_gas=False)

    def clip(self, limit: float) -> torch.Tensor | None:  # noqa: ARG002
        return None  # the step clips, to the limit in DeepSpeed's config

    def step(self) -> float | None:
        self.module.step()
        norm = self.module.get_global_grad_norm()
        return None if norm is None else float(norm)

    def warm_up_backward(self, loss: torch.Tensor) -> None:
        """Nothing: DeepSpeed has no way to forget gradients that are already reduced, and fixes its order itself."""

    def save(self, folder: Path) -> None:
        try:
            with _quiet_deepspeed():
                self.module.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
        except Exception as error:
            raise ShardWriteError(
                f"a shard of the checkpoint could not be written to {folder}; earlier checkpoints are untouched. "
                f"{type(error).__name__}: {error}"
            ) from error

    def load(self, folder: Path) -> None:
        with _quiet_deepspeed():
            path, _ = self.module.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {folder}")

    def full_state_dict(self) -> dict[str, Any]:
        state = self.accelerator.get_state_dict(self.module) or {}
        return {name.removeprefix("model."): value for name, value in state.items()}


class Fsdp2:
    """PyTorch's fully sharded data parallelism. State is gathered to be stored, so any number of ranks can load it."""

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel, module: torch.nn.Module, optimizer: Any):
        self.accelerator, self.model = accelerator, model
        self.module, prepared = accelerator.prepare(module, optimizer)
        self.optimizer: Optimizer = prepared.optimizer
        if "FSDP" not in type(self.module).__name__:
            raise RuntimeError(f"FSDP2 was asked for, but the network became a {type(self.module).__name__}")

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.module.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def clip(self, limit: float) -> torch.Tensor | None:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        full: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return full

    def step(self) -> float | None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return None

    def warm_up_backward(self, loss: torch.Tensor) -> None:
        (loss * 0.0).backward()
        self.optimizer.zero_grad(set_to_none=True)

    def save(self, folder: Path) -> None:
        weights = self.full_state_dict()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.module, self.optimizer, options=options)
        if self.accelerator.is_main_process:
            save_file(_without_aliases(weights), str(folder / WEIGHTS))
            write_optimizer(folder, state)

    def load(self, folder: Path) -> None:
        options = StateDictOptions(full_state_dict=True, strict=False)  # a tied weight is stored once
        weights: dict[str, Any] = dict(load_file(folder / WEIGHTS))
        set_model_state_dict(self.model, weights, options=options)
        state, _ = read_optimizer(folder, "cpu")
        set_optimizer_state_dict(self.module, self.optimizer, state, options=StateDictOptions(full_state_dict=True))

    def full_state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def _load_device(accelerator: Accelerator) -> str:
    return "cpu" if accelerator.device.type == "cpu" else str(accelerator.device)


def _without_aliases(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that are tied stand once: safetensors refuses two names for one memory."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen:
            kept[name] = tensor
            seen.add(tensor.data_ptr())
    return kept


@contextlib.contextmanager
def built_whole(accelerator: Accelerator) -> Iterator[None]:
    """A network with random weights is built whole also under ZeRO-3, so that it starts as on any machine.

    transformers shards at construction when it finds a ZeRO-3 config in its module's global, whatever Accelerate's
    zero3_init_flag says; hence the global is set aside.
    """
    plugin = accelerator.state.deepspeed_plugin
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(plugin.dschf)


@contextlib.contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """DeepSpeed logs each file it opens; errors still come as exceptions."""
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
