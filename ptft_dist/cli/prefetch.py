"""`ptft prefetch`: fetch what a recipe needs from the Hub, before it starts on nodes without internet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ptft_dist.hub import Fetched


def prefetch(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe such as sft.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as model.path=NAME.")] = None,
) -> None:
    """Fetch all models, tokenizers and data sets of a recipe from the Hub into the local caches (HF_HOME).

    Afterwards the recipe starts with HF_HUB_OFFLINE=1. Local files are only checked.
    """
    from ptft_dist import api

    for each in api.prefetch(recipe, overrides or []):
        print(_line(each))


def _line(each: Fetched) -> str:
    state = "local, exists" if each.local else f"revision {each.revision or 'of the default branch'}"
    return f"{each.key}: {each.name}, {state}, {each.size_bytes / 1e6:,.1f} MB, {each.path}"
