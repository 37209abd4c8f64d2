"""An optimizer's state as named tensors and JSON, so that no checkpoint of ours needs a pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TENSORS, REST = "optimizer.safetensors", "optimizer.json"


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by "<parameter>.<key>", and the rest. A parameter is its number, or its name where the state says so."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for parameter, entries in state["state"].items():
        for key, value in _unwrapped(entries):
            if isinstance(value, torch.Tensor):
                tensor = value.detach().contiguous()
                # bitsandbytes' quantisation maps are one memory for all parameters, which safetensors refuses.
                tensors[f"{parameter}.{key}"] = tensor.clone() if tensor.data_ptr() in seen else tensor
                seen.add(tensor.data_ptr())
            else:
                plain.setdefault(str(parameter), {})[key] = value
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def _unwrapped(entries: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """bitsandbytes puts 8-bit state into an inner dictionary, to hide it from FSDP; it loads it from the outer too."""
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from value.items()
        else:
            yield key, value


def unflatten_optimizer(tensors: dict[str, torch.Tensor], rest: dict[str, Any]) -> dict[str, Any]:
    """The inverse of flatten_optimizer."""
    state: dict[int | str, dict[str, Any]] = {_parameter(name): dict(plain) for name, plain in rest["state"].items()}
    for name, tensor in tensors.items():
        parameter, key = name.rsplit(".", 1)
        state.setdefault(_parameter(parameter), {})[key] = tensor
    return {"state": state, "param_groups": rest["param_groups"]}


def _parameter(name: str) -> int | str:
    return int(name) if name.isdigit() else name


def write_optimizer(folder: Path, state: dict[str, Any], extra: dict[str, Any] | None = None) -> None:
    tensors, rest = flatten_optimizer(state)
    save_file(tensors, str(folder / TENSORS))
    (folder / REST).write_text(json.dumps({**rest, **(extra or {})}))


def read_optimizer(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict, and the extra values that were written with it."""
    rest = json.loads((folder / REST).read_text())
    return unflatten_optimizer(load_file(folder / TENSORS, device=device), rest), rest
