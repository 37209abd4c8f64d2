"""The backend of one process and of DDP: every process has the complete network and optimizer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ptft_dist.engine.parameters import first_names, place, require_stored, stored_tensors
from ptft_dist.engine.state import WEIGHTS, Files, read_optimizer, tensor_shapes, write_optimizer, write_tensors


class Whole:
    """Every process has the complete network and optimizer. Rank 0 writes them to checkpoints."""

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel, module: torch.nn.Module, optimizer: Any):
        place(module, accelerator.device)
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

    def whole_weight(self, parameter: Any) -> torch.Tensor:
        weight: torch.Tensor = parameter.detach()
        return weight.float()

    def whole_gradient(self, parameter: Any) -> torch.Tensor:
        gradient: torch.Tensor = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        return gradient.float()

    def add_gradient(self, parameter: Any, gradient: torch.Tensor) -> None:
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def set_weight(self, parameter: Any, value: torch.Tensor) -> None:
        parameter.data.copy_(value)

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

    def whole_weights(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def warm_up_backward(self, loss: torch.Tensor) -> bool:
        (loss * 0.0).backward()
        unused = any(each.requires_grad and each.grad is None for each in self.model.parameters())
        self.optimizer.zero_grad(set_to_none=True)
        if not unused or not isinstance(self.module, DistributedDataParallel) or self.module.find_unused_parameters:
            return False
        self._expect_unused(self.module)
        return True

    def _expect_unused(self, wrapped: DistributedDataParallel) -> None:
        """Let DDP look for parameters without a gradient at each backward pass; otherwise it waits for them.

        Such as XLNet's mask_emb, which only its pretraining uses. The optimizer skips them, as in one process.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of `broadcast_buffers`, which has no successor yet
            self.module = DistributedDataParallel(
                wrapped.module,
                device_ids=wrapped.device_ids,
                output_device=wrapped.output_device,
                broadcast_buffers=wrapped.broadcast_buffers,
                gradient_as_bucket_view=wrapped.gradient_as_bucket_view,
                find_unused_parameters=True,
            )
        models = self.accelerator._models
        models[:] = [self.module if each is wrapped else each for each in models]

    def save(self, folder: Path) -> Files:
        if not self.accelerator.is_main_process:
            return {}
        scaler = {} if self.scaler is None else {"scaler": self.scaler.state_dict()}
        weights = write_tensors(folder / WEIGHTS, stored_tensors(self.model))
        return weights | write_optimizer(folder, self.optimizer.state_dict(), scaler)

    def load(self, folder: Path) -> None:
        path, device = folder / WEIGHTS, self.accelerator.device
        place = "cpu" if device.type == "cpu" else str(device)  # safetensors does not accept "cpu:0"
        require_stored(tensor_shapes(path), self.model, path)
        targets, first = stored_tensors(self.model), first_names(self.model)
        with torch.no_grad(), safe_open(path, "pt", device=place) as file:
            for name in file.keys():  # noqa: SIM118
                targets[first.get(name, name)].copy_(file.get_tensor(name))
        state, extra = read_optimizer(folder, place)
        self.optimizer.load_state_dict(state)
        if self.scaler is not None and "scaler" in extra:  # absent if only this run is in fp16
            self.scaler.load_state_dict(extra["scaler"])

    def full_state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def trained_state_dict(self) -> dict[str, Any]:
        return stored_tensors(self.model)
