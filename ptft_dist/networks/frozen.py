"""Frozen networks: teachers; later also reference models, reward models and base models of adapters.

The recipe names a frozen network. The hash of its files is part of the run's identity. FrozenSource loads it, and
`Engine.prepare_frozen` places it. Checkpoints contain its identity, but not its weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ptft_dist.config.recipe import ModelSection
from ptft_dist.errors import RecipeError
from ptft_dist.networks.load import build_network, local_or_hub, read_config
from ptft_dist.networks.names import adapter_base, is_adapter
from ptft_dist.networks.preview import check_weights

Digests = Callable[[Sequence[Path]], list[str]]
"""The content hash of each file, such as HashMemo.digests, which remembers those of unchanged files."""


def read_digests(files: Sequence[Path]) -> list[str]:
    """The hashes of HashMemo.digests, without a cache."""
    hashes = []
    for path in files:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "blake2b").hexdigest())
    return hashes


@dataclass(frozen=True)
class FrozenSource:
    """The location of a frozen network."""

    key: str
    """The recipe's key that names it, for messages."""
    section: ModelSection
    """Its absolute path or Hub name, and settings for loading it."""

    @property
    def path(self) -> str:
        assert self.section.path is not None
        return self.section.path

    def config(self) -> PretrainedConfig:
        """The network's config; that of its base, with its own labels, for an adapter.

        Raises:
            RecipeError: it cannot be read.
        """
        if not is_adapter(self.path):
            return read_config(self.section, {}, key=self.key)
        from ptft_dist.networks.adapt.reading import read_adapter

        config = read_config(self._base, {}, key=self.key)
        config.update(read_adapter(Path(self.path)).label_keys())
        return config

    def identity(self, digests: Digests) -> str:
        """A hash of its files, and of those of its base if it is an adapter; the commit of a Hub model."""
        sections = [self.section, self._base] if is_adapter(self.path) else [self.section]
        return " on ".join(files_identity(section, digests, key=self.key) for section in sections)

    @property
    def _base(self) -> ModelSection:
        """The base of an adapter."""
        base, revision = adapter_base(self.path)
        return self.section.model_copy(update={"path": base, "revision": revision})

    def load(self, auto_class: Any, dtype: torch.dtype) -> PreTrainedModel:
        """The network in evaluation mode, without gradients, on the CPU; an adapter is merged into its base.

        Raises:
            RecipeError: it cannot be loaded, or lacks weights.
        """
        if is_adapter(self.path):
            from ptft_dist.networks.adapt.reading import load_adapters, read_adapter

            adapted: Any = load_adapters({"frozen": read_adapter(Path(self.path))}, "frozen", dtype)
            model = adapted.merge_and_unload()
        else:
            model, fresh = build_network(self.section, self.config(), 0, auto_class, key=self.key)
            if fresh:
                raise RecipeError(
                    f"{self.key}: {self.path} has no weights for {', '.join(sorted(fresh)[:4])}, so it was not trained "
                    f"as a {type(model).__name__}. Use a model that was"
                )
        for parameter in model.parameters():
            if parameter.is_floating_point():  # buffers are not rounded: rotary frequencies in bf16 shift positions
                parameter.data = parameter.data.to(dtype)
        return model.eval().requires_grad_(False)


def frozen_source(key: str, path: str, revision: str | None, model: ModelSection, base: Path) -> FrozenSource:
    """The source of a frozen network, with the attention and trust_remote_code settings of the trained network.

    Raises:
        RecipeError: there is no such directory, its weight files are damaged, or it is an adapter that cannot be
            merged.
    """
    section = ModelSection(
        path=path, revision=revision, attention=model.attention, trust_remote_code=model.trust_remote_code
    )
    source = FrozenSource(key, local_or_hub(section, base, key=key))
    check_weights(source.section, key)
    if is_adapter(source.path):
        from ptft_dist.networks.adapt.merging import not_mergeable
        from ptft_dist.networks.adapt.reading import read_adapter

        if reason := not_mergeable(read_adapter(Path(source.path), check_base=False)):
            raise RecipeError(
                f"{key}: {source.path}: {reason}, and a frozen network is merged. Use an adapter of a method that can "
                "be merged, such as lora, or a whole model"
            )
    return source


def files_identity(section: ModelSection, digests: Digests, key: str = "model.path") -> str:
    """A hash of the config and weight files of a directory, or the commit of a Hub model."""
    assert section.path is not None
    folder = Path(section.path)
    if not folder.is_dir():
        return str(getattr(read_config(section, {}, key=key), "_commit_hash", None))
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    contents = json.dumps([[file.name for file in files], digests(files)])
    return hashlib.blake2b(contents.encode(), digest_size=16).hexdigest()
