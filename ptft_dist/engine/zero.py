"""The backend of DeepSpeed's ZeRO, stages 1 to 3. Imported only if DeepSpeed is used."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_grad,
    safe_get_local_grad,
    safe_set_full_fp32_param,
    safe_set_full_grad,
    safe_set_local_fp32_param,
    safe_set_local_grad,
)
from deepspeed.utils.mixed_precision_linkage import link_hp_params
from torch.optim import Optimizer
from transformers import PreTrainedModel

from ptft_dist.engine.parameters import first_names, require_stored, stored_tensors
from ptft_dist.engine.state import Files
from ptft_dist.engine.zero_files import PREFIX, load_safely
from ptft_dist.errors import CheckpointError, ShardWriteError


class SafeFiles(TorchCheckpointEngine):
    """Writes and reads DeepSpeed's checkpoint files safely: only known classes and the parameters of this run."""

    def __init__(self, model: PreTrainedModel, prefix: str) -> None:
        """prefix: precedes the names of the network's parameters in DeepSpeed's state dict."""
        super().__init__()
        self.model, self.prefix = model, prefix

    def save(self, state_dict: dict[str, Any], path: str) -> None:
        """Write a file without other names of tied parameters, which `exclude_frozen_parameters` does not remove."""
        if state_dict.get("module") is not None:
            stored = {self.prefix + name for name in stored_tensors(self.model)}
            module = {name: tensor for name, tensor in state_dict["module"].items() if name in stored}
            state_dict = {**state_dict, "module": module}
        try:
            with Path(path).open("wb") as file:
                torch.save(state_dict, file)  # in the zip format, which DeepSpeed's zero_to_fp32.py needs
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # such as a full disk; torch only says that it has failed
                raise error.__context__ from None
            raise

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read a file. Raises CheckpointError if it contains code, or the state of other parameters."""
        state = load_safely(path, map_location)
        if isinstance(state, dict) and state.get("module") is not None:
            self._require_stored(state, Path(path))
        return state

    def _require_stored(self, state: dict[str, Any], path: Path) -> None:
        """Check the parameters of a file. Under ZeRO-3 its tensors are empty, and "param_shapes" has their shapes."""
        known = {name: shape for group in state.get("param_shapes") or () for name, shape in group.items()}
        first = first_names(self.model)
        shapes = {}
        for name, tensor in state["module"].items():
            own = name.removeprefix(self.prefix)
            shapes[own] = torch.Size(known.get(self.prefix + first.get(own, own), tensor.shape))
        require_stored(shapes, self.model, path)


class Zero:
    """ZeRO with an explicit step, which is called after all ranks know that the loss is finite.

    Each rank stores its shards, and only the same number of ranks can load them.
    """

    def __init__(self, accelerator: Accelerator, model: PreTrainedModel, module: torch.nn.Module, optimizer: Any):
        self.accelerator, self.model = accelerator, model
        self.module, prepared = accelerator.prepare(module, optimizer)
        self.optimizer: Optimizer = prepared.optimizer
        if type(self.module).__name__ != "DeepSpeedEngine":
            raise RuntimeError(f"DeepSpeed was requested, but the network became a {type(self.module).__name__}")
        self.module.checkpoint_engine = SafeFiles(model, prefix=PREFIX)
        if self.module.zero_optimization_partition_weights():
            self._zero_padding()
        elif self.module.zero_round_robin_gradients():
            self._link_weights()

    def _zero_padding(self) -> None:
        """Set ZeRO-3's padding to zero. ZeRO-3 pads each parameter to a multiple of the number of ranks, with
        uninitialized memory that is saved too. Otherwise the files of two equal runs would differ."""
        optimizer: Any = self.optimizer
        for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            end = 0
            for parameter in parameters:
                size = parameter.partition_numel()
                begin, end = end, end + size
                own = min(max(parameter.ds_numel - self.accelerator.process_index * size, 0), size)
                flat.data[begin + own : end].zero_()
                parameter.ds_tensor.data[own:].zero_()

    def _link_weights(self) -> None:
        """Link the weights of the network with those of the optimizer again, in the order of round_robin_gradients.

        DeepSpeed 0.19.8 links them as if they had the order of the network, so its functions that read and set fp32
        weights and gradients would use those of other parameters.
        """
        optimizer: Any = self.optimizer
        for index, parameters in enumerate(optimizer.round_robin_bit16_groups):
            if any(optimizer.round_robin_bit16_padding[index]):
                continue  # DeepSpeed has linked it by offsets, which are right
            size = optimizer.single_partition_of_fp32_groups[index].numel()
            link_hp_params(
                lp_param_list=parameters,
                flat_hp_partition=optimizer.single_partition_of_fp32_groups[index],
                gradient_dict=optimizer.averaged_gradients,
                offload_gradient_dict=optimizer.offload_gradient_dict,
                use_offload=optimizer.cpu_offload,
                param_group_index=index,
                partition_start=self.accelerator.process_index * size,
                partition_size=size,
                dp_group=optimizer.real_dp_process_group[index],
            )

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.module.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.module.backward(loss, scale_wrt_gas=False)

    def whole_weight(self, parameter: Any) -> torch.Tensor:
        weight: torch.Tensor = safe_get_full_fp32_param(parameter)
        return weight

    def whole_gradient(self, parameter: Any) -> torch.Tensor:
        gradient: torch.Tensor = safe_get_full_grad(parameter)
        return gradient.float()

    def add_gradient(self, parameter: Any, gradient: torch.Tensor) -> None:
        if self.module.zero_optimization_partition_weights():
            present = safe_get_local_grad(parameter)
            safe_set_local_grad(parameter, present + self._own_part(parameter, gradient).to(present.dtype))
            return
        present = safe_get_full_grad(parameter)
        safe_set_full_grad(parameter, present + gradient.to(present.dtype))

    def set_weight(self, parameter: Any, value: torch.Tensor) -> None:
        if not self.module.zero_optimization_partition_weights():
            safe_set_full_fp32_param(parameter, value)
            parameter.data.copy_(value)
            return
        own = self._own_part(parameter, value)
        safe_set_local_fp32_param(parameter, own)
        parameter.ds_tensor.data.copy_(own)
        if parameter.shape == value.shape:  # small parameters stay complete on each rank
            parameter.data.copy_(value)

    def _own_part(self, parameter: Any, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor like a parameter under ZeRO-3, flat, and padded with zeros at the end.

        DeepSpeed's functions that set complete tensors fail where a part is padded.
        """
        size = parameter.ds_tensor.numel()
        padding = size * self.accelerator.num_processes - whole.numel()
        padded = torch.nn.functional.pad(whole.flatten(), (0, padding))
        return padded.narrow(0, size * self.accelerator.process_index, size)

    def clip(self, limit: float) -> torch.Tensor | None:  # noqa: ARG002
        return None  # the step clips, to the limit in DeepSpeed's config

    def step(self) -> float | None:
        self.module.step()
        norm = self.module.get_global_grad_norm()
        return None if norm is None else float(norm)

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Under stage 3, gather all parameters, and remove the hooks that gather and release those of each layer."""
        if not self.module.zero_optimization_partition_weights():
            yield
            return
        parameters, offload = list(self.module.parameters()), self.module.optimizer.parameter_offload
        with deepspeed.zero.GatheredParameters(parameters):
            for parameter in parameters:
                parameter.ds_active_sub_modules.clear()
            for hook in (*offload.forward_hooks, *offload.backward_hooks):
                hook.remove()
            offload.forward_hooks.clear()
            offload.backward_hooks.clear()
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)

    def warm_up_backward(self, loss: torch.Tensor) -> bool:  # noqa: ARG002
        """Do nothing: DeepSpeed cannot discard reduced gradients, and its order of summation is fixed."""
        return False

    def save(self, folder: Path) -> Files:
        try:
            with _quiet_deepspeed():
                self.module.save_checkpoint(
                    str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True
                )
        except Exception as error:
            raise ShardWriteError(
                f"a shard of the checkpoint could not be written to {folder}; earlier checkpoints are untouched. "
                f"{type(error).__name__}: {error}"
            ) from error
        return {}

    def load(self, folder: Path) -> None:
        optimizer: Any = self.optimizer
        max_norm = optimizer.clip_grad
        with _quiet_deepspeed():
            # Not strict: frozen parameters and the other names of tied ones are not in the files. See SafeFiles.
            path, _ = self.module.load_checkpoint(str(folder), tag="deepspeed", load_module_strict=False)
        optimizer.clip_grad = max_norm  # the file has that of its run
        if path is None:
            raise CheckpointError(f"{folder} contains no DeepSpeed state; restore the checkpoint")

    def full_state_dict(self) -> dict[str, Any]:
        return self._whole(self.model.state_dict(keep_vars=True))

    def trained_state_dict(self) -> dict[str, Any]:
        return self._whole(stored_tensors(self.model))

    def _whole(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Unsharded tensors on rank 0. Trained parameters are the fp32 weights of DeepSpeed's optimizer: in bf16 and
        fp16 those of the network are rounded."""
        sharded = self.module.zero_optimization_partition_weights()
        parameters: list[Any] = list(self.model.parameters())
        if sharded and any(parameter.ds_status == ZeroParamStatus.INFLIGHT for parameter in parameters):
            # A parameter that the last forward pass fetched in advance, and did not use.
            self.module.optimizer.parameter_offload.partition_all_parameters()
        whole: dict[int, torch.Tensor] = {}
        for tensor in tensors.values():  # one after the other, so that at most one is whole on each device
            if id(tensor) in whole:  # another name of a tied parameter
                continue
            if tensor.requires_grad and tensor.dtype != torch.float32:
                weight = self.whole_weight(tensor)
                whole[id(tensor)] = weight.cpu() if self.accelerator.is_main_process else weight.new_empty(0)
            elif not hasattr(tensor, "ds_id"):
                whole[id(tensor)] = tensor.detach()
            else:
                with deepspeed.zero.GatheredParameters([tensor]):
                    kept = tensor if self.accelerator.is_main_process else tensor.new_empty(0)
                    whole[id(tensor)] = kept.detach().cpu().clone()
        return {name: whole[id(tensor)] for name, tensor in tensors.items()}


def gathered(parameters: list[torch.nn.Parameter]) -> Any:
    """A context in which sharded parameters are whole; the changes of rank 0 are kept."""
    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


@contextlib.contextmanager
def _quiet_deepspeed() -> Iterator[None]:
    """Hide DeepSpeed's log line for each file. Errors are raised as exceptions."""
    logger = logging.getLogger("DeepSpeed")
    logger.addFilter(_is_warning)  # a change of the level would make thousands of loggers forget theirs
    try:
        yield
    finally:
        logger.removeFilter(_is_warning)


def _is_warning(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING
