"""`ptft prepare`: prepare the data before training."""

from __future__ import annotations

from typing import Annotated

import typer


def prepare(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe such as clm.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as data.max_length=1024.")] = None,
) -> None:
    """Tokenize and pack a recipe's data into the cache. `ptft train` does the same if it is not done yet."""
    from ptft_dist import api
    from ptft_dist.data.report import describe

    prepared = api.prepare(recipe, overrides or [])
    print(describe(prepared.report, from_cache=prepared.from_cache))
