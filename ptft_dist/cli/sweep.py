"""`ptft sweep`: many trials of one recipe with different values, and the best of them."""

from __future__ import annotations

from typing import Annotated

import typer

from ptft_dist.errors import RecipeError


def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe such as clm.")],
    search: Annotated[str, typer.Argument(help="A search file, or the name of a shipped one such as lr.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, the same in all trials.")] = None,
    out: Annotated[
        str | None, typer.Option(help="The directory of all trials. Default: run_dir of the recipe.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trials at the same time on this machine.")] = 1,
    launch: Annotated[str | None, typer.Option(help="A launch config for every trial, as for ptft train.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes of each trial.")] = None,
) -> None:
    """Train a recipe with different values of some keys, and write a table and the best recipe.

    The same command continues after a stop or a kill. Several of them, on one or more machines, share the trials.
    """
    from ptft_dist.launch.environment import place, tell_run_dir
    from ptft_dist.reporting.messages import show_messages
    from ptft_dist.runs.local import LocalExecutor
    from ptft_dist.runs.search import read_search
    from ptft_dist.runs.sweep import finish, open_sweep, run_sweep

    if place().launched:
        raise RecipeError("ptft sweep starts the processes of its trials: run it outside of a launcher, with --launch")
    show_messages()
    given = [("--launch", launch), ("--processes", processes)]
    options = [word for name, value in given if value is not None for word in (name, str(value))]
    trials = open_sweep(read_search(search), recipe, overrides or [], out)
    tell_run_dir(trials.folder)
    executor = LocalExecutor()
    with executor.forwarding_signals():
        code = run_sweep(trials, executor, options, workers=workers)
    raise typer.Exit(code or finish(trials))
