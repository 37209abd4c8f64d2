"""Learning rates of single parameters: layer-wise decay, the head's own, and LoRA+."""

from __future__ import annotations

import re
from typing import Any

import torch

from ptft_dist.config.recipe import ModelSection, OptimSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt.partial import blocks
from ptft_dist.networks.critic import CRITIC
from ptft_dist.networks.facts import NetworkFacts

_IN_CRITIC = f"{CRITIC}."


def lr_scales(
    model: torch.nn.Module, section: ModelSection, optim: OptimSection, network: NetworkFacts
) -> dict[str, float]:
    """The factor of the learning rate of every trained parameter, by name.

    Layer-wise decay multiplies by optim.layer_decay for each block between a parameter and the head (Howard and Ruder
    2018; Clark et al. 2020): block i of n gets decay^(n - i), embeddings decay^(n + 1), everything after the blocks 1.

    A critic of its own beside the network has blocks and a head of its own.

    Raises:
        RecipeError: optim.layer_decay or optim.head_lr_scale has no parameter to apply to.
    """
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    scales = dict.fromkeys(trained, 1.0)
    lora = section.adapt.lora
    if lora is not None and lora.plus_ratio is not None:
        scales |= {name: lora.plus_ratio for name in trained if "lora_B" in name or "lora_embedding_B" in name}
    if optim.layer_decay is not None:
        depths = _depths(model, trained)
        if len(set(depths.values())) == 1:
            raise RecipeError("optim.layer_decay: has no effect here: all trained parameters have the same depth")
        scales = {name: scale * optim.layer_decay ** depths[name] for name, scale in scales.items()}
    if optim.head_lr_scale is not None:
        head = [name for name in trained if _in_head(name, model, network)]
        if not head:
            raise RecipeError("optim.head_lr_scale: no trained parameter belongs to an output head. Remove the key")
        scales |= {name: scales[name] * optim.head_lr_scale for name in head}
    return scales


def _depths(model: torch.nn.Module, names: list[str]) -> dict[str, int]:
    """Name -> how many blocks follow a parameter, plus 1; 0 for those after the last block."""
    if inside := [name.removeprefix(_IN_CRITIC) for name in names if name.startswith(_IN_CRITIC)]:
        of_critic = _depths(model.get_submodule(CRITIC), inside)
        own = _depths(model, [name for name in names if not name.startswith(_IN_CRITIC)])
        return own | {_IN_CRITIC + name: depth for name, depth in of_critic.items()}
    lists = blocks(model)
    if not lists:
        raise RecipeError("optim.layer_decay: this network has no list of blocks. Use optim.groups")
    order = [name for name, _ in model.named_parameters() if not name.startswith(_IN_CRITIC)]
    depths: dict[str, int] = {}
    for prefix, module in lists:
        members = {name: int(name[len(prefix) + 1 :].split(".")[0]) for name in order if name.startswith(f"{prefix}.")}
        depths |= {name: len(module) - i for name, i in members.items()}
        first, last = (order.index(end(members, key=order.index)) for end in (min, max))
        for place, name in enumerate(order):
            if place < first:
                depths.setdefault(name, len(module) + 1)
            elif place > last and name not in depths:
                depths[name] = 0
    for name in order:  # parameters between encoder and decoder count as after the encoder
        depths.setdefault(name, 0)
    return {name: depths[name] for name in names}


def _in_head(name: str, model: torch.nn.Module, network: NetworkFacts) -> bool:
    """Whether a parameter of the network itself lies outside of its body, in the layers that compute the output."""
    if name.startswith(_IN_CRITIC):
        critic: Any = model.get_submodule(CRITIC)
        return not name.startswith(f"{_IN_CRITIC}{critic.base_model_prefix}.")
    base = getattr(model, "get_base_model", lambda: model)()
    plain = name.removeprefix("base_model.model.").removeprefix("base_model.")
    plain = re.sub(r"\.modules_to_save\.[^.]+", "", plain)
    if network.output_head is not None and plain.startswith(f"{network.output_head}."):
        return True
    body = (f"{base.base_model_prefix}.", "prompt_encoder.")
    return not plain.startswith(body) and "lora_" not in plain
