"""Reads DeepSpeed's checkpoint files safely, and puts weights together from the shards of ZeRO."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from ptft_dist.engine.deepspeed_settings import Precision
from ptft_dist.errors import CheckpointError

PREFIX = "model."
"""Precedes the names of the network's parameters in DeepSpeed's state dict; see LossModule."""
# The classes in DeepSpeed's files. Loading refuses all other classes, because a pickle can call any function.
_KNOWN_CLASSES: list[Any] = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]


def load_safely(path: str | Path, map_location: Any = None) -> Any:
    """Read a file. Raises CheckpointError if it contains code."""
    try:
        with torch.serialization.safe_globals(_KNOWN_CLASSES):
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is not loaded: it contains more than tensors and numbers, and could run code. Resume from a "
            "checkpoint of a run of your own"
        ) from None


def read_module(folder: Path, precision: Precision) -> dict[str, torch.Tensor]:
    """The trained parameters and buffers in a checkpoint of ZeRO-1, 2 or 3, by the network's own names.

    They have the data type that the network had in training. Under ZeRO-3 they are put together from the fp32 weights
    in the optimizer files of all ranks, and rounded as DeepSpeed rounds them after each update.
    """
    paths = sorted(folder.glob("*mp_rank_00_model_states.pt"), key=_rank)
    if not paths:
        raise CheckpointError(f"{folder} contains no DeepSpeed state; restore the checkpoint")
    state = load_safely(paths[0], "cpu")
    module: dict[str, torch.Tensor] = state["module"]
    shards = sorted(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=_rank)
    if state.get("param_shapes") and any(not tensor.numel() for tensor in module.values()):
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        shapes = {name: shape for group in state["param_shapes"] for name, shape in group.items()}
        whole = {name: tensor.to(dtype) for name, tensor in _gathered(shards, shapes).items()}
        module = {name: whole.get(name, tensor) for name, tensor in module.items()}
    return {name.removeprefix(PREFIX): tensor for name, tensor in module.items()}


def _rank(path: Path) -> int:
    """The data-parallel rank in a file's name, such as zero_pp_rank_1_mp_rank_00_model_states.pt."""
    _, found, rest = path.name.partition("zero_pp_rank_")
    return int(rest.partition("_")[0]) if found else 0


def _gathered(paths: list[Path], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The fp32 weights of ZeRO-3.

    Each rank has one part of every parameter, in the order of `shapes`, one after the other. The parts of a parameter
    have equal sizes; the last ones end with padding.
    """
    flat = []
    for path in paths:
        groups = load_safely(path, "cpu")["optimizer_state_dict"]["fp32_flat_groups"]
        flat.append(torch.cat([group.flatten() for group in groups]))
    weights, begin = {}, 0
    for name, shape in shapes.items():
        size = -(-shape.numel() // len(flat))
        parts = [each[begin : begin + size] for each in flat]
        if any(len(part) != size for part in parts):
            raise CheckpointError(
                f"{paths[0].parent}: the shards are smaller than the parameters; restore the checkpoint"
            )
        weights[name] = torch.cat(parts)[: shape.numel()].view(shape)
        begin += size
    if any(len(each) != begin for each in flat):
        raise CheckpointError(f"{paths[0].parent}: the shards are larger than the parameters; restore the checkpoint")
    return weights
