"""Optimizers by name, and parameter groups with their learning rates and weight decay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ptft_dist.config.recipe import OptimSection
from ptft_dist.errors import RecipeError

BITSANDBYTES = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")
"""The optimizers of bitsandbytes."""
_SMALLEST_8BIT = 4096  # elements; bitsandbytes keeps fp32 state of smaller parameters


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    optim: OptimSection,
    scales: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups with `lr_scale` and `weight_decay`. Parameters with fewer than two dimensions get no decay.

    Args:
        scales: parameter name -> factor of its learning rate, on top of those of optim.groups. Default: 1.

    Raises:
        RecipeError: a group of the recipe matches no parameter, so it would have no effect.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    unused = {group.match for group in optim.groups}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        # Under ZeRO-3 a parameter is an empty placeholder; DeepSpeed stores its real shape in ds_shape.
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        lr_scale, weight_decay = 1.0, optim.weight_decay if dimensions >= 2 else 0.0
        chosen = next((group for group in optim.groups if re.search(group.match, name)), None)
        if chosen is not None:
            unused.discard(chosen.match)
            lr_scale = chosen.lr_scale
            if chosen.weight_decay is not None:
                weight_decay = chosen.weight_decay
        lr_scale *= (scales or {}).get(name, 1.0)
        groups.setdefault((lr_scale, weight_decay), []).append(parameter)
    if unused:
        raise RecipeError(f"optim.groups: no parameter's name matches {', '.join(map(repr, sorted(unused)))}")
    return [{"params": p, "lr_scale": lr, "weight_decay": decay} for (lr, decay), p in groups.items()]


def build_optimizer(
    groups: list[dict[str, Any]],
    optim: OptimSection,
    device: torch.device,
    tell: Callable[[str], None] = lambda _text: None,
) -> torch.optim.Optimizer:
    """The optimizer `optim.name` for `groups`. On a CPU, a paged optimizer runs without paging; `tell` reports it."""
    if not groups:
        raise RecipeError("nothing is trained: every parameter of the network is frozen")
    if "adamw" in optim.name:
        adam: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas or (0.9, 0.95), "eps": optim.eps or 1e-8}
        if optim.name == "adamw":
            return torch.optim.AdamW(groups, fused=device.type in ("cpu", "cuda", "xpu", "mps"), **adam)
        import bitsandbytes

        classes = {
            "adamw_8bit": bitsandbytes.optim.AdamW8bit,
            "paged_adamw": bitsandbytes.optim.PagedAdamW32bit,
            "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
        }
        if device.type == "cpu" and optim.name.startswith("paged"):
            tell(f"optim.name: {optim.name} runs without paging on a CPU; the updates are the same")
            classes |= {
                "paged_adamw": bitsandbytes.optim.AdamW32bit,
                "paged_adamw_8bit": bitsandbytes.optim.AdamW8bit,
            }
        return classes[optim.name](groups, **adam)
    if optim.name == "sgd":
        return torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum or 0.0)
    return torch.optim.Adafactor(groups, lr=optim.lr)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def moment_bytes(optim: OptimSection, shapes: Iterable[torch.Size]) -> int:
    """The size of the optimizer's state for parameters with these shapes, in bytes."""
    return sum(_moment_bytes(optim, shape) for shape in shapes)


def _moment_bytes(optim: OptimSection, shape: torch.Size) -> int:
    count = shape.numel()
    if optim.name == "sgd":
        return 4 * count if optim.momentum else 0
    if optim.name == "adafactor":  # of a matrix, the means of its rows and of its columns
        return 4 * (count if len(shape) < 2 else count // shape[-1] + count // shape[-2])
    if optim.name.endswith("8bit") and count >= _SMALLEST_8BIT:
        return 2 * (count + 4 * -(-count // 256) + 4 * 256)  # with the scale of each block, and the table of values
    return 8 * count
