"""Recipes: read with overrides, or written for the file of another trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ptft_dist.api.calls import Overrides, Source, as_words, hiding_secrets
from ptft_dist.config.load import Loaded, read_recipe
from ptft_dist.errors import RecipeError
from ptft_dist.networks.names import check_not_replaced, check_revisions
from ptft_dist.tasks.registry import recipe_class

if TYPE_CHECKING:
    from ptft_dist.converting.convert import Converted


@hiding_secrets
def load_recipe(source: Source, overrides: Overrides = (), *, training: bool = False) -> Loaded:
    """Read, override and validate a recipe. Raises RecipeError, which lists all mistakes.

    training: refuse a recipe whose task is evaluated only, and a run that would replace a model that it reads.
    """
    loaded = read_recipe(source if isinstance(source, Mapping) else str(source), as_words(overrides), recipe_class())
    if training and not loaded.recipe.settings.trains:
        raise RecipeError(f"task: {loaded.recipe.task} is evaluated only: ptft evaluate MODEL RECIPE")
    check_revisions(loaded.recipe, loaded.base)
    if training:
        check_not_replaced(loaded.recipe, loaded.base)
    return loaded


def values_of_environment(loaded: Loaded) -> dict[str, str]:
    """The values of a recipe that come from environment variables and must be equal at a resume: dotted key -> text.

    The text is that of the recipe with a hash of the value, which may be secret.
    """
    from ptft_dist.checkpoint.identity import values_of_environment as run

    return run(loaded)


@hiding_secrets
def convert(
    file: str | Path, out: str | Path, overrides: Overrides = (), *, task: str | None = None, processes: int = 1
) -> tuple[Converted, str]:
    """Write a recipe that does the same as a configuration of TRL, axolotl, LLaMA-Factory or TrainingArguments.

    Args:
        task: what the file trains, if its keys do not say it.
        processes: the number of processes of that training, which is a factor of the batch size.

    Returns:
        What became of each key, and the mistakes of the recipe, such as a missing model; empty if it is valid.

    Raises:
        RecipeError: the file is of no known trainer, or `out` exists.
    """
    from ptft_dist.converting.convert import convert as converted_from
    from ptft_dist.reporting.output import write_text

    target = Path(out)
    if target.exists():
        raise RecipeError(f"{target}: already exists, nothing was written; remove the file or name another with --out")
    words = as_words(overrides)
    converted = converted_from(Path(file), target, recipe_class(), task=task, processes=processes, overrides=words)
    write_text(target, converted.text)
    try:
        load_recipe(target)
    except RecipeError as error:
        return converted, str(error)
    return converted, ""
