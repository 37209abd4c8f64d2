"""Adapts a pretrained network: sets which of its parameters are trained, or adds an adapter of peft.

The network is adapted after the task has prepared it and before the engine wraps it. `AdaptedFacts` tell the task what
an adapter changes in the network's interface.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ptft_dist.config.adapt import PROMPTS, AdaptSection
from ptft_dist.config.recipe import ModelSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt.partial import train_part
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.networks.names import ADAPTER_CONFIG, adapter_base, is_adapter


def adapted_facts(network: NetworkFacts, adapt: AdaptSection) -> NetworkFacts:
    """The facts of the network with the adapter. Virtual tokens take positions, so positions cannot be given."""
    virtual = virtual_tokens(adapt)
    if not virtual:
        return network
    positions = None if network.max_positions is None else network.max_positions - virtual
    arguments = network.arguments - {"position_ids", "logits_to_keep"}
    return replace(network, arguments=arguments, max_positions=positions)


def check_positions_left(network: NetworkFacts, adapt: AdaptSection, max_length: int) -> None:
    """Raises RecipeError if rows and virtual tokens together exceed the network's positions. network: adapted facts."""
    virtual, left = virtual_tokens(adapt), network.max_positions
    if virtual and left is not None and left < max_length:
        raise RecipeError(
            f"model.adapt: {virtual} virtual tokens leave {left} positions, and data.max_length is {max_length}: lower "
            "one of them"
        )


def virtual_tokens(adapt: AdaptSection) -> int:
    """Number of virtual tokens of a prompt method, also of peft's own and of a saved one; else 0."""
    if adapt.method in PROMPTS:
        return int(adapt.settings.tokens)
    if adapt.peft is not None:
        return int(adapt.peft.get("num_virtual_tokens") or 0)
    if adapt.adapter is None or not is_adapter(adapt.adapter):
        return 0
    config = json.loads((Path(adapt.adapter) / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return int(config.get("num_virtual_tokens") or 0)


def adapt_network(
    model: PreTrainedModel, adapt: AdaptSection, setup: Any, fresh: Collection[str] = (), *, preview: bool = False
) -> Any:
    """Set which parameters of `model` are trained; return it, or the PeftModel around it.

    Args:
        setup: an AdapterSetup.
        fresh: names of parameters with random weights.
        preview: `model` has no weights, and the adapter's initial values do not matter.

    Raises:
        RecipeError: the method does not fit the network.
    """
    if not adapt.adds_adapter:
        train_part(model, adapt, fresh)
        return model
    from ptft_dist.networks.adapt.adapters import add_adapter

    return add_adapter(model, adapt, setup, sorted(fresh), preview=preview)


NOT_SHARDED = {"loha": "zero3", "ln_tuning": "zero3", "vblora": "fsdp2"}
"""Methods of peft -> the backend under which peft or PyTorch fail in them."""


def check_backend(section: ModelSection, kind: str, precision: str) -> None:
    """Check that a backend can run the method. kind: single, ddp, zero1, zero2, zero3 or fsdp2. Raises RecipeError."""
    method = section.adapt.method if section.adapt.peft is None else str(section.adapt.peft["type"]).lower()
    if NOT_SHARDED.get(method) == kind:
        raise RecipeError(
            f"model.adapt.peft: {method} cannot be trained under {kind}. Use another launch config, or lora"
        )
    if precision != "fp32" and method == "vera" and kind not in ("single", "ddp"):
        raise RecipeError(
            f"model.adapt.peft: vera has fp32 matrices of its own, and {kind} computes in {precision}. Use "
            "train.precision: fp32, DDP, or lora"
        )
    if precision != "fp32" and method == "ia3" and section.quantize is not None and kind.startswith("zero"):
        raise RecipeError(
            f"model.adapt: ia3 scales the results of quantized layers in fp32, and {kind} computes in {precision}. Use "
            "DDP, or lora"
        )
    if section.quantize is not None and not section.adapt.adds_adapter and kind == "fsdp2":
        raise RecipeError(
            f"model.quantize: with model.adapt: {section.adapt.method} the quantized weights are exported too, and "
            "fsdp2 cannot gather them. Use an adapter such as lora, or ZeRO-3"
        )
    lora, quantize = section.adapt.lora, section.quantize
    if (
        lora is not None
        and lora.dora
        and quantize is not None
        and quantize.type == "int8"
        and not torch.cuda.is_available()
    ):
        raise RecipeError(
            "model.adapt.lora.dora: on a CPU, peft loses the scales of int8 weights when it dequantizes them. Use "
            "model.quantize: nf4, or a GPU"
        )
    if lora is not None and lora.init == "eva" and kind == "zero3":
        raise RecipeError(
            "model.adapt.lora.init: eva runs the base before training, and zero3 has sharded it by then. Use ZeRO-2, "
            "DDP or FSDP2, or init: pissa"
        )


def reading_section(section: ModelSection, path: str) -> ModelSection:
    """The section for reading a trained model: a model directory or Hub name, or an adapter directory."""
    plain = {"config": None, "new_head": False, "quantize": None, "dtype": "auto"}
    if not is_adapter(path):
        return section.model_copy(update={**plain, "path": path, "revision": None, "adapt": AdaptSection()})
    base, revision = adapter_base(path)
    adapt = AdaptSection(adapter=path)
    kept = {"quantize": section.quantize, "dtype": section.dtype, "new_head": section.new_head}
    return section.model_copy(update={**plain, **kept, "path": base, "revision": revision, "adapt": adapt})


def convert_trained(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Convert trained parameters. Frozen ones keep their data type, and those that ZeRO-3 has sharded already."""
    for parameter in model.parameters():
        if parameter.requires_grad and not hasattr(parameter, "ds_id"):
            parameter.data = parameter.data.to(dtype)
