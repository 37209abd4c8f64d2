"""Chat templates."""

from __future__ import annotations

from pathlib import Path

from ptft_dist.config.recipe import Recipe


def saved_template(recipe: Recipe, base: Path) -> str | None:  # noqa: ARG001
    """The template that the tokenizer is saved with, if it is not its own."""
    return None
