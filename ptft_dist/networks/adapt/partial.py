"""Trains a part of a network's own parameters: the last blocks, those that match an expression, or the biases."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

import torch

from ptft_dist.config.adapt import AdaptSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.critic import CRITIC


def train_part(model: torch.nn.Module, adapt: AdaptSection, fresh: Collection[str]) -> None:
    """Set `requires_grad` of all parameters by the method of model.adapt.

    Args:
        fresh: names of parameters with random weights, which every method except `match` trains too.

    Raises:
        RecipeError: the method selects nothing, or parameters with random weights would stay frozen.
    """
    if adapt.full:
        return
    names = [name for name, _ in model.named_parameters()]
    if adapt.last_layers is not None:
        chosen = _last(model, names, adapt.last_layers)
    elif adapt.match is not None:
        chosen = {name for name in names if re.search(adapt.match, name)}
        if not chosen:
            raise RecipeError(f"model.adapt.match: no parameter matches {adapt.match!r}. Some names: {sample(names)}")
        if left := sorted(set(fresh) - chosen):
            raise RecipeError(
                f"model.adapt.match: {', '.join(left[:4])} would keep random weights, because model.path has no "
                "weights for them and they are not matched. Extend the expression"
            )
    else:
        chosen = {name for name in names if name.endswith("bias")}
        if not chosen:
            raise RecipeError("model.adapt: bitfit: this network has no biases. Use lora or last_layers")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen or name in fresh)


def blocks(model: torch.nn.Module) -> list[tuple[str, torch.nn.ModuleList]]:
    """The lists of a network's blocks with their names: one list, or two in an encoder-decoder, in order.

    Those of a critic beside the network are left out.
    """
    found: list[tuple[str, torch.nn.ModuleList]] = []
    for name, module in model.named_modules():
        if name.startswith(f"{CRITIC}."):
            continue
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, torch.nn.ModuleList) and not inside and _weighted(module):
            found.append((name, module))
    longest = max((len(module) for _, module in found), default=0)
    return [
        (name, module) for name, module in found if len(module) == longest or "decoder" in name or "encoder" in name
    ]


def _weighted(module: torch.nn.ModuleList) -> bool:
    return len(module) > 0 and all(any(True for _ in block.parameters()) for block in module)


def _last(model: torch.nn.Module, names: Sequence[str], count: int) -> set[str]:
    """The parameters of the last `count` blocks, and all that are defined after the blocks. Tied ones are not."""
    lists = blocks(model)
    if not lists:
        raise RecipeError("model.adapt.last_layers: this network has no list of blocks. Use match")
    name, module = lists[-1]
    if count > len(module):
        raise RecipeError(f"model.adapt.last_layers: {count} is more than the network's {len(module)} blocks")
    prefixes = tuple(f"{name}.{i}." for i in range(len(module) - count, len(module)))
    end = max(i for i, each in enumerate(names) if each.startswith(f"{name}."))
    return {each for i, each in enumerate(names) if each.startswith(prefixes) or i > end}


def sample(names: Iterable[str], most: int = 8) -> str:
    """Some of the names, one for each different ending."""
    by_ending: dict[str, str] = {}
    for name in names:
        by_ending.setdefault(".".join(name.split(".")[-2:]), name)
    return ", ".join(list(by_ending.values())[:most])
