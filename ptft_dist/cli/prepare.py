"""`ptft prepare`: tokenize and pack now, so that training starts at once."""

from __future__ import annotations

from typing import Annotated

import typer


def prepare(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe such as clm.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as data.max_length=1024.")] = None,
) -> None:
    """Tokenize and pack a recipe's data into the cache. `ptft train` does the same if it is not done yet."""
    from ptft_dist.api import load_recipe
    from ptft_dist.data.prepare import describe
    from ptft_dist.data.prepare import prepare as run
    from ptft_dist.data.sources import check_sources
    from ptft_dist.tasks.registry import encoder_class

    loaded = load_recipe(recipe, overrides or [])
    check_sources(loaded.recipe, loaded.base)
    prepared = run(loaded.recipe, loaded.base, encoder_class(loaded.recipe.task))
    print(describe(prepared.report, from_cache=prepared.from_cache))
