"""The network that a student learns from: held against the student before any process group exists, then loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptft_dist.config.recipe import ModelSection, Recipe
from ptft_dist.data.cache import HashMemo, cache_root, fingerprint
from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.networks.load import build_model, local_or_hub, read_config
from ptft_dist.tasks.clm.settings import ClmSettings
from ptft_dist.tasks.sft.settings import SftSettings


@dataclass(frozen=True)
class Teacher:
    """section: where it is; order: which of its logits belongs to each of the student's choices."""

    section: ModelSection
    order: list[int]


def teacher_section(recipe: Recipe, base: Path) -> ModelSection:
    """The teacher as a model section, its path made absolute."""
    settings = recipe.distillation
    assert settings is not None
    section = ModelSection(
        path=settings.teacher,
        revision=settings.revision,
        attention=recipe.model.attention,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return local_or_hub(section, base, key="distillation.teacher")


def check_teacher(
    recipe: Recipe, section: ModelSection, tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any]
) -> list[int]:
    """Which of the teacher's logits belongs to each token of the tokenizer, or to each label.

    Raises:
        RecipeError: the teacher has another vocabulary, or other labels.
    """
    _check_vocabulary(section, tokenizer)
    if recipe.task == "classification":
        theirs = read_config(section, {}, key="distillation.teacher").label2id or {}
        absent = [label for label in facts["labels"] if label not in theirs]
        if absent:
            raise RecipeError(
                f"distillation.teacher: {section.path} has the labels {', '.join(theirs)}, but not "
                f"{', '.join(absent)}. A teacher must know the labels of the data."
            )
        return [int(theirs[label]) for label in facts["labels"]]
    assert isinstance(recipe.settings, ClmSettings | SftSettings)
    if recipe.settings.head == "fused":
        raise RecipeError(f"{recipe.task}.head: fused makes no logits, which a student needs; leave it out")
    return list(range(max(tokenizer.get_vocab().values()) + 1))


def _check_vocabulary(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> None:
    """The teacher reads the student's token ids. Raises RecipeError if they mean something else to it."""
    try:
        theirs = load_tokenizer(str(section.path), revision=section.revision).get_vocab()
    except RecipeError as error:
        raise RecipeError(str(error).replace("tokenizer.path", "distillation.teacher", 1)) from None
    ours = tokenizer.get_vocab()
    if different := {token for token, i in ours.items() if theirs.get(token) != i}:
        raise RecipeError(
            f"distillation.teacher: {section.path} has another vocabulary ({len(different):,} of {len(ours):,} tokens "
            "have another id or none there). Teacher and student must share their tokenizer: set tokenizer.path to it."
        )


def teacher_fingerprint(recipe: Recipe, section: ModelSection, base: Path) -> str:
    """Of its files, or its commit on the Hub: another teacher makes another run."""
    assert section.path is not None
    folder = Path(section.path)
    if not folder.is_dir():
        return str(getattr(read_config(section, {}, key="distillation.teacher"), "_commit_hash", None))
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    memo = HashMemo(cache_root(recipe.data.cache_dir, base.absolute()) / "hashes.json", lambda _: None)
    return fingerprint([[file.name for file in files], memo.digests(files)])


def load_teacher(section: ModelSection, auto_class: Any, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Frozen, in evaluation mode, on the device. Every rank holds the whole of it."""
    config = read_config(section, {}, key="distillation.teacher")
    model = build_model(section, config, 0, auto_class).eval().requires_grad_(False)
    return model.to(device=device, dtype=dtype)
