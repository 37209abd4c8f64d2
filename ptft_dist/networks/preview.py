"""Checks of a network before its weights are loaded and before a process group exists."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PretrainedConfig, PreTrainedModel

from ptft_dist.config.recipe import ModelSection
from ptft_dist.errors import RecipeError


def preview_network(section: ModelSection, config: PretrainedConfig, auto_class: Any) -> PreTrainedModel:
    """The network that will be built, without weights (on PyTorch's meta device).

    Properties that depend on files of a pretrained network, such as its generation config, may still differ.

    Raises:
        RecipeError: no such network can be built, or it does not fit into this machine's memory.
    """
    kernel: dict[str, Any] = {} if section.attention == "auto" else {"attn_implementation": section.attention}
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto_class.from_config(
                config, dtype=torch.float32, trust_remote_code=section.trust_remote_code, **kernel
            )
    except Exception as error:  # the architecture's code may raise anything, and only the config can cause it
        where = "model.config" if section.path is None else f"model.path: {section.path}"
        raise RecipeError(
            f"{where}: no {config.model_type} network can be built from this config ({type(error).__name__}: {error}). "
            "Compare its sizes with those of a published model"
        ) from error
    if section.path is None:
        _check_memory(model)
    return model


def _check_memory(model: PreTrainedModel) -> None:
    """Raises RecipeError if random weights, which each process creates completely in fp32, exceed the memory."""
    needed, machine = 4 * sum(p.numel() for p in model.parameters()), machine_memory_bytes()
    if needed > machine:
        name, largest = max(model.named_parameters(), key=lambda named: named[1].numel())
        raise RecipeError(
            f"model.config: the weights take {needed / 1e9:,.0f} GB in fp32, and this machine has {machine / 1e9:,.0f} "
            f"GB of memory. The largest is {name} {list(largest.shape)}: lower the sizes in model.config, or "
            "tokenizer.train.vocab_size"
        )


def machine_memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_weights(section: ModelSection, key: str = "model.path") -> None:
    """Check the weight files of a local directory. Reads little more than their headers.

    Raises:
        RecipeError: a file is missing or damaged, for example incompletely copied.
    """
    folder = Path(section.path or "")
    if section.path is None or not folder.is_dir():
        return
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    for index in folder.glob("*.index.json"):
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if missing := sorted(name for name in shards if not (folder / name).is_file()):
            raise RecipeError(f"{key}: {folder} has no {missing[0]}, which {index.name} lists. Copy it again")
    for file in files:
        try:
            if file.suffix == ".bin":
                torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
            else:
                with safe_open(file, "pt"):
                    pass
        except Exception as error:  # these libraries raise a dozen unrelated types for a damaged file
            raise RecipeError(
                f"{key}: {file} cannot be read; it is damaged or incomplete ({error}). Copy it again"
            ) from error
