"""`ptft folds`: the table of a cross-validation whose folds have been trained."""

from __future__ import annotations

from typing import Annotated

import typer


def folds(
    recipe: Annotated[str, typer.Argument(help="A recipe file with data.folds, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as optim.lr=1e-4.")] = None,
) -> None:
    """Write RUN/folds.json, the metrics of all folds, and print them with mean and standard deviation.

    `ptft train` does the same after the last fold.
    """
    from ptft_dist.api import load_recipe
    from ptft_dist.reporting.messages import show_messages
    from ptft_dist.runs.folds import summarize_folds

    show_messages()
    summarize_folds(load_recipe(recipe, overrides or []), recipe, overrides or [])
