"""How much of a training survives the rounding of exported weights.

The weights of a base in bf16 are numbers of bf16. A change by less than half the distance to the next one is rounded
away: not by chance, as noise, but always back to the base. With a small learning rate that can be the whole training.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from ptft_dist.config.recipe import ModelSection
from ptft_dist.networks.load import dtype_name

SAMPLED = 2**27
"""Weights that are compared, at least; of a larger network, every n-th tensor."""
CHUNK = 2**24
"""Weights in fp64 at a time."""
LITTLE = 0.9
"""Less of a change than this is told."""


def kept_change(
    section: ModelSection, prefix: str, state: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> float | None:
    """The share of the weights' change since `section.path` that remains when they are rounded to `dtype`.

    For weights w that were w0 and become r, it is sum((r - w0)(w - w0)) / sum((w - w0)^2): 1 if rounding only adds
    noise, 0 if all return to the base.

    Args:
        prefix: of the network's names, which those in the base's files may lack (base_model_prefix).
        state: weights by name, not yet rounded.

    Returns:
        None if it is unknown: nothing is rounded or has changed, or the base has no readable safetensors files.
    """
    rounded = {name: x for name, x in state.items() if x.is_floating_point() and x.dtype != dtype}
    if section.path is None or not rounded:
        return None
    try:
        with ExitStack() as files:
            tensors = {}
            for path in _weight_files(section):
                file = files.enter_context(safe_open(path, "pt"))
                for name in file.keys():  # noqa: SIM118  # it has no __iter__
                    known = name if name in rounded else f"{prefix}.{name}"
                    if known in rounded and list(rounded[known].shape) == file.get_slice(name).get_shape():
                        tensors[known] = (file, name)
            names = sorted(tensors)
            total = sum(rounded[name].numel() for name in names)
            kept = whole = 0.0
            for name in names[:: max(1, total // SAMPLED)]:
                file, stored = tensors[name]
                both = file.get_tensor(stored), rounded[name].detach().cpu()
                for old, new in zip(*(tensor.flatten().split(CHUNK) for tensor in both), strict=True):
                    before = old.double()  # float8 has no arithmetic
                    change = new.double() - before
                    kept += float(((new.to(dtype).double() - before) * change).sum())
                    whole += float((change * change).sum())
    except (OSError, SafetensorError):
        return None
    return kept / whole if whole > 0 else None


def little_kept(kept: float | None, dtype: torch.dtype, remedy: str) -> str | None:
    """What to say about the result of `kept_change`; None: nothing."""
    if kept is None or kept >= LITTLE:
        return None
    return (
        f"{dtype_name(dtype)} keeps {max(kept, 0.0):.0%} of what the training has changed in the weights: most changes "
        f"are smaller than the steps between its numbers. {remedy}"
    )


def _weight_files(section: ModelSection) -> list[Path]:
    """The safetensors files of a directory, or of a model of the Hub on this machine."""
    folder = Path(str(section.path))
    if not folder.is_dir():
        found = cached_file(
            str(section.path),
            "config.json",
            revision=section.revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
        )
        folder = Path(found or "").parent
    return sorted(folder.glob("model*.safetensors"))
