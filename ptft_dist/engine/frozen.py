"""Placement of frozen networks: teachers, reference models, reward models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from ptft_dist.engine.deepspeed_settings import frozen_deepspeed_config
from ptft_dist.engine.fsdp2 import whole_buffers
from ptft_dist.engine.loss_module import LossModule
from ptft_dist.engine.parameters import place, require_tied, tied_groups


class FrozenNetwork:
    """A placed network in evaluation mode. All ranks must call it together, like the trained network."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        self.module, self.device = module, device

    def forward(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
        """Return call(network, inputs) without gradients. A named tuple becomes a plain tuple."""
        with torch.no_grad():
            out = self.module({key: x.to(self.device, non_blocking=True) for key, x in inputs.items()}, call)
        for part in self.module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()  # the outermost parts stay unsharded for a backward pass, which a frozen network lacks
        return out


class Offloaded(FrozenNetwork):
    """A network in the host's memory. Its parameters are copied to the device for each call."""

    def __init__(self, module: torch.nn.Module, device: torch.device) -> None:
        super().__init__(module, device)
        for parameter in module.parameters():
            parameter.data = parameter.data.cpu()
            if device.type == "cuda":
                parameter.data = parameter.data.pin_memory()  # several times as fast
        for owner in module.modules():
            for name, buffer in owner.named_buffers(recurse=False):
                owner.register_buffer(name, buffer.to(device), name not in owner._non_persistent_buffers_set)

    def forward(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
        host = {parameter: parameter.data for parameter in self.module.parameters()}
        try:
            for parameter, data in host.items():
                parameter.data = data.to(self.device, non_blocking=True, copy=True)
            return super().forward(call, inputs)
        finally:
            for parameter, data in host.items():
                parameter.data = data


def place_frozen(
    model: PreTrainedModel,
    kind: str,
    accelerator: Accelerator,
    deepspeed_config: dict[str, Any] | None,
    *,
    offload: bool = False,
) -> FrozenNetwork:
    """Place a network: complete on each rank under single, ddp, zero1 and zero2; sharded under zero3 and fsdp2.

    offload: where it is complete, keep its parameters in the host's memory; it is on the device only while it runs.
    """
    model.requires_grad_(False)
    ties, module = tied_groups(model), LossModule(model)
    if kind == "zero3":
        assert deepspeed_config is not None
        module = _sharded_by_deepspeed(module, deepspeed_config)
    elif kind == "fsdp2":
        with whole_buffers(module):
            module = fsdp2_prepare_model(accelerator, module)
    elif not offload:
        place(module, accelerator.device)
    require_tied(model, ties, kind)
    module.eval()
    return (Offloaded if offload else FrozenNetwork)(module, accelerator.device)


def _sharded_by_deepspeed(module: LossModule, deepspeed_config: dict[str, Any]) -> Any:
    """A DeepSpeed engine without optimizer: its hooks gather the parameters of a layer while the layer runs."""
    import deepspeed

    hidden_size = module.config.get_text_config().hidden_size
    config = frozen_deepspeed_config(deepspeed_config, hidden_size, module.model.dtype)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine
