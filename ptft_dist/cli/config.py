"""`ptft config`: check or print a recipe without running it. Does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ptft_dist.config.recipe import Recipe

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="A file, or the name of a shipped recipe.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Values to set, such as optim.lr=1e-4.")
]

app = typer.Typer(help="Check a recipe, show all its values, or print the schema.", rich_markup_mode=None)


@app.command()
def check(recipe: RecipeArgument, overrides: OverridesArgument = None) -> None:
    """Report all mistakes in a recipe, missing data files, and files whose first row lacks columns of the task."""
    from ptft_dist.api import load_recipe
    from ptft_dist.data.first_rows import check_first_rows
    from ptft_dist.data.sources import check_sources
    from ptft_dist.tasks.registry import encoder_class

    loaded = load_recipe(recipe, overrides or ())
    check_sources(loaded.recipe, loaded.base)
    check_first_rows(loaded.recipe, loaded.base, encoder_class(loaded.recipe.task))
    print(f"{loaded.path}: valid ({_summary(loaded.recipe)})")


@app.command()
def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    every: Annotated[bool, typer.Option("--all", help="Also the sections of other tasks.")] = False,
) -> None:
    """Print every value with its origin: the file, the command line, the environment or a default."""
    from ptft_dist.api import load_recipe
    from ptft_dist.config.load import describe

    print(describe(load_recipe(recipe, overrides or ()), all_tasks=every))


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe: type, default and description of each key."""
    import json

    from ptft_dist.tasks.registry import recipe_class

    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    print(json.dumps(head | recipe_class().model_json_schema(), indent=2))


def _summary(recipe: Recipe) -> str:
    batch, train = recipe.batch, recipe.train
    length = next(
        f"{getattr(train, name):,} {unit}"
        for name, unit in (("max_steps", "updates"), ("epochs", "epochs"), ("max_tokens", "tokens"))
        if getattr(train, name) is not None
    )
    update = f"{batch.global_size:,} rows" if batch.global_size is not None else f"{batch.global_tokens:,} tokens"
    return f"task {recipe.task}, {length}, {update} an update"
