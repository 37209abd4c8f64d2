"""Writes tensors and optimizer state to files without pickles, and hashes them while writing.

A file is reported as {"bytes": size, "sha256": hex digest}, the format of a checkpoint's manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

WEIGHTS, TENSORS, REST = "model.safetensors", "optimizer.safetensors", "optimizer.json"
Files = dict[str, dict[str, Any]]  # name -> {"bytes": size, "sha256": hex digest}

# The names of data types in the header of a safetensors file: https://github.com/huggingface/safetensors#format
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


# --- files ------------------------------------------------------------------------------------------------------------


def write_parts(path: Path, parts: Iterator[bytes | memoryview]) -> Files:
    """Write `parts` to a file and flush it to the disk; return its size and SHA-256, without reading it again."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for part in parts:
            rest = memoryview(part)
            digest.update(rest)
            size += rest.nbytes
            while rest:
                rest = rest[file.write(rest) :]  # an unbuffered file may write only a part
        os.fsync(file.fileno())
    return {path.name: {"bytes": size, "sha256": digest.hexdigest()}}


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> Files:
    """Write a safetensors file. At most one tensor at a time is copied to the host."""
    return write_parts(path, _safetensors(tensors))


def _safetensors(tensors: dict[str, torch.Tensor]) -> Iterator[bytes | memoryview]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the file into memory and expect aligned data
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tensor_shapes(path: Path) -> dict[str, torch.Size]:
    """Name -> shape of each tensor in a safetensors file. Reads only its header."""
    with safe_open(path, "pt") as file:
        return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


# --- optimizers -------------------------------------------------------------------------------------------------------


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors by "PARAMETER.KEY", and the rest. PARAMETER is an index or a name."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for parameter, entries in state["state"].items():
        for key, value in _unwrapped(entries):
            if isinstance(value, torch.Tensor):
                tensors[f"{parameter}.{key}"] = value.detach()
            else:
                plain.setdefault(str(parameter), {})[key] = value
    return tensors, {"state": plain, "param_groups": state["param_groups"]}


def _unwrapped(entries: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entries of one parameter, without bitsandbytes' inner dictionary.

    bitsandbytes stores 8-bit state in an inner dictionary to hide it from FSDP. It can also load it from the outer one.
    """
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


def write_optimizer(folder: Path, state: dict[str, Any], extra: dict[str, Any] | None = None) -> Files:
    """Write the state dict of an optimizer to two files in `folder`. extra: additional JSON values."""
    tensors, rest = flatten_optimizer(state)
    text = json.dumps({**rest, **(extra or {})}).encode()
    return write_tensors(folder / TENSORS, tensors) | write_parts(folder / REST, iter([text]))


def read_optimizer(folder: Path, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict, and a dictionary with the extra values that were written with it."""
    rest = json.loads((folder / REST).read_text())
    return unflatten_optimizer(load_file(folder / TENSORS, device=device), rest), rest
