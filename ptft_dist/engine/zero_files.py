"""Reads DeepSpeed's checkpoint files safely, and puts fp32 weights together from the shards of ZeRO."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

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


@torch.no_grad()
def read_module(folder: Path) -> dict[str, torch.Tensor]:
    """The trained parameters and buffers in a checkpoint of ZeRO-1, 2 or 3, by the network's own names.

    Parameters are put together from the fp32 weights in the optimizer files of all ranks: in bf16 and fp16 those of the
    network are rounded.
    """
    paths = sorted(folder.glob("*mp_rank_00_model_states.pt"), key=_rank)
    shards = sorted(folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"), key=_rank)
    if not paths or not shards:
        raise CheckpointError(f"{folder} contains no DeepSpeed state; restore the checkpoint")
    state = load_safely(paths[0], "cpu")
    weights = _put_together(shards, state["param_shapes"])
    module: dict[str, torch.Tensor] = {name: weights.get(name, tensor) for name, tensor in state["module"].items()}
    return {name.removeprefix(PREFIX): tensor for name, tensor in module.items()}


def _rank(path: Path) -> int:
    """The data-parallel rank in a file's name, such as zero_pp_rank_1_mp_rank_00_model_states.pt."""
    _, found, rest = path.name.partition("zero_pp_rank_")
    return int(rest.partition("_")[0]) if found else 0


def _shard(path: Path) -> dict[str, Any]:
    """What an optimizer file says of weights, without the moments."""
    state = load_safely(path, "cpu")["optimizer_state_dict"]
    wanted = ("fp32_flat_groups", "single_partition_of_fp32_groups", "param_alignment_paddings")
    return {key: state[key] for key in wanted if key in state}


def _put_together(paths: list[Path], groups: list[dict[str, torch.Size]]) -> dict[str, torch.Tensor]:
    """The fp32 weights by name.

    Args:
        paths: the optimizer file of each rank.
        groups: name -> shape of the parameters of each parameter group, in DeepSpeed's order.

    Raises:
        CheckpointError: the files have more or fewer weights.
    """
    weights: dict[str, torch.Tensor] = {}
    states = [_shard(path) for path in paths]
    try:
        if "fp32_flat_groups" in states[0]:
            # ZeRO-3: each rank has one part of every parameter. The parts have equal sizes; the last end with padding.
            flat = [torch.cat([part.flatten() for part in state["fp32_flat_groups"]]) for state in states]
            shapes = {name: shape for group in groups for name, shape in group.items()}
            sizes = [-(-shape.numel() // len(flat)) for shape in shapes.values()]
            parts = zip(*(each.split(sizes) for each in flat), strict=True)
            for (name, shape), own in zip(shapes.items(), parts, strict=True):
                weights[name] = torch.cat(own)[: shape.numel()].view(shape)
        else:
            # ZeRO-1 and 2: the parameters of a group, each with padding, are one vector; each rank has a part of it.
            vectors = zip(*(state["single_partition_of_fp32_groups"] for state in states), strict=True)
            paddings = states[0]["param_alignment_paddings"]
            for group, own, padding in zip(groups, vectors, paddings, strict=True):
                sizes = [shape.numel() + more for shape, more in zip(group.values(), padding, strict=True)]
                for (name, shape), part in zip(group.items(), torch.cat(own).split(sizes), strict=True):
                    weights[name] = part[: shape.numel()].view(shape)
    except (ValueError, RuntimeError) as error:  # of zip and split
        raise CheckpointError(
            f"{paths[0].parent}: the shards do not contain the parameters ({error}); restore the checkpoint"
        ) from None
    return weights
