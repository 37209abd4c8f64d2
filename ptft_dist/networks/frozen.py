"""Networks that are read and not trained: a teacher today; a reference policy, a reward model, the base of an adapter.

One is named by the recipe, identified by the hash of its files (another one makes another run), loaded here, and placed
by the engine (`Engine.prepare_frozen`). A checkpoint holds its identity, never its weights.
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
from ptft_dist.networks.load import build_model, local_or_hub, read_config

Digests = Callable[[Sequence[Path]], list[str]]
"""The content hash of each file, such as HashMemo.digests, which remembers those of unchanged files."""


@dataclass(frozen=True)
class FrozenSource:
    """Where a frozen network is. key: the recipe's, for messages; section: with an absolute path or a Hub name."""

    key: str
    section: ModelSection

    @property
    def path(self) -> str:
        assert self.section.path is not None
        return self.section.path

    def config(self) -> PretrainedConfig:
        """Raises RecipeError if there is none."""
        return read_config(self.section, {}, key=self.key)

    def identity(self, digests: Digests) -> str:
        return files_identity(self.section, digests, key=self.key)

    def load(self, auto_class: Any, dtype: torch.dtype) -> PreTrainedModel:
        """In evaluation mode, without gradients, on the CPU. Raises RecipeError."""
        model = build_model(self.section, self.config(), 0, auto_class, key=self.key)
        return model.eval().requires_grad_(False).to(dtype=dtype)


def frozen_source(key: str, path: str, revision: str | None, model: ModelSection, base: Path) -> FrozenSource:
    """The network that a recipe names beside the trained one, whose kernel and trust it shares.

    Raises:
        RecipeError: the path can only be a directory, and there is none.
    """
    section = ModelSection(
        path=path, revision=revision, attention=model.attention, trust_remote_code=model.trust_remote_code
    )
    return FrozenSource(key, local_or_hub(section, base, key=key))


def files_identity(section: ModelSection, digests: Digests, key: str = "model.path") -> str:
    """A hash of the config and weight files of a directory, or the commit of a Hub model."""
    assert section.path is not None
    folder = Path(section.path)
    if not folder.is_dir():
        return str(getattr(read_config(section, {}, key=key), "_commit_hash", None))
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    contents = json.dumps([[file.name for file in files], digests(files)])
    return hashlib.blake2b(contents.encode(), digest_size=16).hexdigest()
