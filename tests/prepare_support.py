"""Shared by the tests of `prepare`: a few short documents, a tokenizer trained on them, and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data import prepare as module
from ptft_dist.data.prepare import Prepared
from ptft_dist.data.store import TokenStore
from ptft_dist.data.tokenizer import train_tokenizer
from ptft_dist.tasks.registry import encoder_class, recipe_class

SENTENCE = "the quick brown fox jumps over a lazy dog while seven wizards watch in silence and it's 42"
DOCUMENTS = [f"{SENTENCE[i % 17 :: 1 + i % 3]} number {i}" for i in range(60)]


def prepare(recipe: Recipe, base: Path, **options: Any) -> Prepared:
    """`ptft_dist.data.prepare.prepare` with the encoder of the recipe's task."""
    return module.prepare(recipe, base, encoder_class(recipe.task), **options)


def save_tokenizer(directory: Path) -> Path:
    train_tokenizer(TokenizerTraining(vocab_size=300), DOCUMENTS).save_pretrained(directory)
    return directory


def write_text(base: Path) -> Path:
    """Write one file with a document per line to `base`, a recipe's directory."""
    (base / "text.txt").write_text("\n".join(DOCUMENTS))
    return base


def recipe(tokenizer: Path | str | dict[str, Any], clm: dict[str, Any] | None = None, **data: Any) -> Recipe:
    train = [{"path": "text.txt", "document": "line"}]
    return recipe_class().model_validate(
        {
            "task": "clm",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"train": tokenizer} if isinstance(tokenizer, dict) else {"path": str(tokenizer)},
            "data": {"train": train, "max_length": 16, "cache_dir": "cache"} | data,
            "clm": clm or {},
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1},
            "run_dir": "run",
        }
    )


def all_ids(store: TokenStore) -> list[int]:
    return [token for i in range(len(store)) for token in store.row(i).input_ids.tolist()]
