"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2021), as a method of peft, which has none of its own.

`register` makes it known to peft. Afterwards `PeftModel.from_pretrained` loads exported adapters like all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from transformers.pytorch_utils import Conv1D

NAME = "BOTTLENECK"
AFTER_ATTENTION = (
    *("attention.output.dense", "self_attn.o_proj", "attn.o_proj", "attn.Wo", "self_attn.out_proj", "attn.c_proj"),
    *("attention.out_lin", "attention.dense", "SelfAttention.o", "self_attention.dense", "attn.out_proj"),
    *("attention.out_proj", "self_attn.dense", "attn.o"),
)
"""Ends of the names of output projections of attention in common architectures."""
AFTER_FEED_FORWARD = (
    *("mlp.down_proj", "mlp.c_proj", "mlp.Wo", "ffn.lin2", "mlp.dense_4h_to_h", "DenseReluDense.wo", "mlp.fc2"),
    *("block_sparse_moe.w2", "layers.*.fc2", "layer.*.output.dense", "mlp.fc_out", "ffn.down_proj"),
)
"""Ends of the names of output projections of feed-forward layers; `*` is the number of a block."""
_ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def places(model: torch.nn.Module, placement: str) -> list[str]:
    """The full names of the layers after which adapters are inserted; empty unless both kinds that the placement needs
    are known. placement: houlsby or pfeiffer."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    after_attention = [name for name in names if _ends(name, AFTER_ATTENTION)]
    after = [name for name in names if _ends(name, AFTER_FEED_FORWARD) and name not in after_attention]
    if not after or (placement == "houlsby" and not after_attention):
        return []
    return [name for name in names if name in {*after, *(after_attention if placement == "houlsby" else ())}]


def _ends(name: str, ends: Sequence[str]) -> bool:
    parts = name.split(".")
    for end in ends:
        wanted = end.split(".")
        own = parts[-len(wanted) :]
        if len(own) == len(wanted) and all(
            w == o or (w == "*" and o.isdigit()) for w, o in zip(wanted, own, strict=True)
        ):
            return True
    return False


@dataclass
class BottleneckConfig(PeftConfig):
    """The config that peft writes to adapter_config.json."""

    target_modules: list[str] | str | None = field(default=None, metadata={"help": "names of the adapted layers"})
    size: int = field(default=64, metadata={"help": "width of the bottleneck"})
    activation: str = field(default="relu", metadata={"help": "relu, gelu or silu"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "layers that are trained as a whole"})
    layers_to_transform: list[int] | None = None
    layers_pattern: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]


class BottleneckLayer(torch.nn.Module, BaseTunerLayer):
    """h = layer(x); h + up(f(down(h))). `up` is zero at first, so that the network's outputs do not change."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ()

    def __init__(self, base_layer: torch.nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = torch.nn.ModuleDict()
        self.bottleneck_up = torch.nn.ModuleDict()
        self.activations: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def out_features(self) -> int:
        layer: Any = self.get_base_layer()
        return int(layer.nf if isinstance(layer, Conv1D) else layer.out_features)

    def update_layer(self, adapter_name: str, config: BottleneckConfig, **_: Any) -> None:
        """Add an adapter with new weights."""
        down, up = torch.nn.Linear(self.out_features, config.size), torch.nn.Linear(config.size, self.out_features)
        torch.nn.init.normal_(down.weight, std=0.02)
        for zero in (down.bias, up.weight, up.bias):
            torch.nn.init.zeros_(zero)
        self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        self.activations[adapter_name] = config.activation
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return hidden
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down: Any = self.bottleneck_down[name]
                up: Any = self.bottleneck_up[name]
                activation: Any = _ACTIVATIONS[self.activations[name]]
                inner = activation(down(hidden.to(down.weight.dtype)))
                hidden = hidden + up(inner).to(hidden.dtype)
        return hidden

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise NotImplementedError("a bottleneck adapter is nonlinear and cannot be merged")

    def unmerge(self) -> None:
        raise NotImplementedError("a bottleneck adapter is never merged")


class BottleneckModel(BaseTuner):
    """Inserts the layers."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # type: ignore[misc]

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: BottleneckConfig,
        adapter_name: str,
        target: torch.nn.Module,
        target_name: str,
        parent: torch.nn.Module,
        current_key: str,  # noqa: ARG002
        **_: Any,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = BottleneckLayer(target, adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def register() -> None:
    """Add the method to peft. Its types are an enumeration without a way to extend it, so a member is added here."""
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
    if PeftType(NAME) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=BottleneckConfig, model_cls=BottleneckModel)
