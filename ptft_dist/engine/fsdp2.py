"""The backend of PyTorch's fully sharded data parallelism, version 2 (FSDP2)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ptft_dist.engine.parameters import first_names, persistent_buffers, require_stored, stored_tensors
from ptft_dist.engine.state import (
    TENSORS,
    WEIGHTS,
    Files,
    read_optimizer,
    tensor_shapes,
    write_optimizer,
    write_tensors,
)


class Fsdp2:
    """Each rank has a shard. State is gathered before it is written, so any number of ranks can load it."""

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel, module: torch.nn.Module, optimizer: Any):
        self.accelerator, self.model = accelerator, model
        with whole_buffers(module):
            self.module, prepared = accelerator.prepare(module, optimizer)
        self.optimizer: Optimizer = prepared.optimizer
        if "FSDP" not in type(self.module).__name__:
            raise RuntimeError(f"FSDP2 was requested, but the network became a {type(self.module).__name__}")

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.module.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def whole_weight(self, parameter: Any) -> torch.Tensor:
        weight: torch.Tensor = parameter.detach().full_tensor()
        return weight.float()

    def whole_gradient(self, parameter: Any) -> torch.Tensor:
        if parameter.grad is None:
            return torch.zeros(parameter.shape, device=self.accelerator.device)
        gradient: torch.Tensor = parameter.grad.full_tensor()
        return gradient.float()

    def add_gradient(self, parameter: Any, gradient: torch.Tensor) -> None:
        shard = _shard(gradient, parameter)
        parameter.grad = shard if parameter.grad is None else parameter.grad.add_(shard)

    def set_weight(self, parameter: Any, value: torch.Tensor) -> None:
        parameter.data.copy_(_shard(value, parameter))

    def clip(self, limit: float) -> torch.Tensor | None:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        full: torch.Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return full

    def step(self) -> float | None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return None

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Gather all parameters, and keep them after the forward pass of each layer."""
        parts: list[Any] = [part for part in self.module.modules() if isinstance(part, FSDPModule)]
        groups = [group for part in parts for group in part._get_fsdp_state()._fsdp_param_groups]
        resharding = [group.post_forward_mesh_info for group in groups]
        try:
            for group in groups:
                group.post_forward_mesh_info = None  # no resharding
            for part in parts:
                part.unshard()
            yield
        finally:
            for group, mesh in zip(groups, resharding, strict=True):
                group.post_forward_mesh_info = mesh
            self._reshard()

    def warm_up_backward(self, loss: torch.Tensor) -> bool:
        (loss * 0.0).backward()
        self.optimizer.zero_grad(set_to_none=True)
        return False

    def save(self, folder: Path) -> Files:
        gathered = StateDictOptions(full_state_dict=True, cpu_offload=True)
        stored = self.trained_state_dict()
        state = get_optimizer_state_dict(self.module, self.optimizer, options=gathered)
        if not self.accelerator.is_main_process:
            return {}
        return write_tensors(folder / WEIGHTS, stored) | write_optimizer(folder, state)

    def load(self, folder: Path) -> None:
        path = folder / WEIGHTS
        require_stored(tensor_shapes(path), self.model, path)
        self._reshard()
        first = first_names(self.model)
        weights: dict[str, Any] = {first.get(name, name): tensor for name, tensor in load_file(path).items()}
        # Not strict: frozen parameters and the other names of tied ones are not in the file.
        set_model_state_dict(self.model, weights, options=StateDictOptions(full_state_dict=True, strict=False))
        if not tensor_shapes(folder / TENSORS):  # SGD without momentum has no state, which PyTorch cannot load
            return
        state, _ = read_optimizer(folder, "cpu")
        set_optimizer_state_dict(self.module, self.optimizer, state, options=StateDictOptions(full_state_dict=True))

    def _reshard(self) -> None:
        """Reshard the outermost parts, which stay unsharded after a forward pass without a backward pass."""
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def full_state_dict(self) -> dict[str, Any]:
        return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def trained_state_dict(self) -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        weights: dict[str, Any] = get_model_state_dict(self.model, options=options)
        if not self.accelerator.is_main_process:
            return {}
        return {name: weights[name] for name in stored_tensors(self.model)}  # a tied parameter has two names here


def _shard(whole: torch.Tensor, like: Any) -> DTensor:
    """A tensor that every rank has, sharded like `like`, without communication."""
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@contextlib.contextmanager
def whole_buffers(module: torch.nn.Module) -> Iterator[None]:
    """A context in which Accelerate shards the parameters of a network, but not its buffers, which become rank 0's.

    Accelerate shards every entry of the state dict of a network that only rank 0 has read, and fails at buffers. It
    keeps the buffers that are not in the state dict.
    """
    owners = {name: module.get_submodule(name.rpartition(".")[0]) for name in persistent_buffers(module)}
    for name, owner in owners.items():
        owner._non_persistent_buffers_set.add(name.rpartition(".")[2])
    try:
        yield
    finally:
        for name, owner in owners.items():
            owner._non_persistent_buffers_set.discard(name.rpartition(".")[2])
    for buffer in persistent_buffers(module).values():
        dist.broadcast(buffer, src=0)
