"""The trained parameters of a network, its tied parameters, and the tensors that a checkpoint contains."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import torch

from ptft_dist.errors import CheckpointError, RecipeError

_ALIGNMENT = 64  # bytes, that of PyTorch's own tensors on a CPU


def trainable_names(model: torch.nn.Module) -> list[str]:
    """Names of the parameters that require gradients. A tied parameter is listed under its first name only."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def element_counts(model: torch.nn.Module) -> tuple[int, int]:
    """Number of elements of all parameters and of the trained ones, over all ranks. Tied parameters count once."""
    # Under ZeRO-3 a parameter is an empty placeholder; DeepSpeed stores its real size in ds_numel.
    sizes = [(_numel(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def network_sizes(model: torch.nn.Module, apart: Collection[str] = ()) -> dict[str, dict[str, int]]:
    """Parameters, trained parameters and bytes of the weights of a network, over all ranks, and apart from it those
    of its submodules `apart`, where they exist. Tied parameters count once."""
    whole = _sizes(model)
    parts = {name: _sizes(part) for name, part in model.named_children() if name in apart}
    own = {key: value - sum(part[key] for part in parts.values()) for key, value in whole.items()}
    return {"model": own, **parts}


def _sizes(model: torch.nn.Module) -> dict[str, int]:
    count, trained = element_counts(model)
    size = sum(_stored(p) * p.element_size() for p in model.parameters())
    return {"parameters": count, "trained": trained, "bytes": size}


def _stored(parameter: torch.nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _numel(parameter: torch.nn.Parameter) -> int:
    quantized = getattr(parameter, "quant_state", None)
    if quantized is not None:  # a 4-bit parameter holds several weights in each element
        return int(torch.Size(quantized.shape).numel())
    return _stored(parameter)


def place(module: torch.nn.Module, device: torch.device) -> None:
    """Move a network to a device.

    On a CPU, copy the tensors that do not begin at a multiple of 64 bytes, as weights in a mapped file can: kernels may
    add their elements in another order, so a reloaded network would compute other last digits than the trained one.
    """
    module.to(device)
    if device.type == "cpu":
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.data_ptr() % _ALIGNMENT:
                tensor.data = tensor.data.clone()


def tied_groups(model: torch.nn.Module) -> list[list[str]]:
    """The names of each tied parameter, such as ["model.embed_tokens.weight", "lm_head.weight"]."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def require_tied(model: torch.nn.Module, groups: Iterable[Collection[str]], kind: str) -> None:
    """Raises RecipeError unless the names of each group are still one parameter of `model`.

    A library that replaces parameters can untie them. Embedding and head would then silently be trained separately.
    """
    now = dict(model.named_parameters(remove_duplicate=False))
    for names in groups:
        if len({id(now.get(name)) for name in names}) > 1:
            raise RecipeError(
                f"{kind} untied the parameters {', '.join(names)}: they would be trained separately. Use another "
                "launch config (under FSDP2: fsdp_cpu_ram_efficient_loading: false), or "
                "model.config.tie_word_embeddings: false"
            )


def first_names(model: torch.nn.Module) -> dict[str, str]:
    """Each name of a tied parameter -> the first of its names."""
    return {name: names[0] for names in tied_groups(model) for name in names}


def persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the state of the network, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def stored_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a network that a checkpoint contains: trained parameters (tied ones once), persistent buffers."""
    trained: dict[str, torch.Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return trained | persistent_buffers(model)


def require_stored(shapes: dict[str, torch.Size], model: torch.nn.Module, path: Path) -> None:
    """Raises CheckpointError unless a file contains exactly the stored tensors of `model`, with equal shapes.

    shapes: name -> shape in the file. A tied parameter may have any of its names.
    """
    expected, first = stored_tensors(model), first_names(model)
    stored = {first.get(name, name): shape for name, shape in shapes.items()}
    differences = {
        "missing": expected.keys() - stored.keys(),
        "not trained by this run": stored.keys() - expected.keys(),
        "of another shape": {n for n in expected.keys() & stored.keys() if real_shape(expected[n]) != stored[n]},
    }
    if any(differences.values()):
        lines = "".join(f"\n  {what}: {_listed(names)}" for what, names in differences.items() if names)
        raise CheckpointError(
            f"{path} does not contain the parameters that this run trains:{lines}\n"
            "Resume with the recipe that wrote it, or choose another run_dir."
        )


def real_shape(tensor: torch.Tensor) -> torch.Size:
    """The unsharded shape; under ZeRO-3 a parameter is an empty placeholder."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def _listed(names: Collection[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more
