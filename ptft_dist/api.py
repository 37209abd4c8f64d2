"""What the command line, notebooks and scripts call."""

from __future__ import annotations

from collections.abc import Sequence

from ptft_dist.config.load import Loaded, read_recipe
from ptft_dist.tasks.registry import recipe_class


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Loaded:
    """Read, override and validate a recipe: a file, or the name of a shipped one. Raises RecipeError."""
    return read_recipe(name_or_path, overrides, recipe_class())
