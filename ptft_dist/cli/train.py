"""`ptft train`: on this process, or on several through `accelerate launch`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe such as clm.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as optim.lr=1e-4.")] = None,
    launch: Annotated[
        str | None, typer.Option(help="A launch config: a file, or a shipped one such as multi_gpu, zero2, cpu.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes, over all machines.")] = None,
    resume: Annotated[str, typer.Option(help="auto (the newest good checkpoint), never, or a checkpoint.")] = "auto",
    accept: Annotated[
        list[str] | None, typer.Option(help="A key whose change since the checkpoint is meant (repeatable).")
    ] = None,
) -> None:
    """Train a recipe; go on where the run directory's newest checkpoint is."""
    from ptft_dist.config.load import load_recipe
    from ptft_dist.launch.environment import place

    loaded = load_recipe(recipe, overrides or [])
    if (launch is not None or processes is not None) and not place().launched:
        raise typer.Exit(_launch(recipe, overrides or [], launch, processes, resume, accept or []))

    from ptft_dist.worker import Options, run

    raise typer.Exit(run(loaded, Options(resume, tuple(accept or ()))))


def _launch(
    recipe: str, overrides: list[str], launch: str | None, processes: int | None, resume: str, accept: list[str]
) -> int:
    """Check and prepare everything in this one process, then start the ranks."""
    from ptft_dist.config.load import load_recipe
    from ptft_dist.config.resolve import batch_shape
    from ptft_dist.data.prepare import describe, prepare
    from ptft_dist.data.sources import check_sources
    from ptft_dist.launch.local import command, default_launch, local_processes
    from ptft_dist.launch.local import launch as start
    from ptft_dist.metrics import say
    from ptft_dist.run_files import make_run_dir

    loaded = load_recipe(recipe, overrides)
    arguments = ["train", recipe, *overrides, "--resume", resume]
    arguments += [word for key in accept for word in ("--accept", key)]
    name = launch or default_launch()
    words = command(name, processes, arguments)
    check_sources(loaded.recipe, loaded.base)
    if processes is not None:
        batch_shape(loaded.recipe, processes)
    run_dir = Path(loaded.recipe.run_dir)
    make_run_dir(run_dir)
    prepared = prepare(loaded.recipe, loaded.base)
    if not prepared.from_cache:
        say(describe(prepared.report))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return start(words, run_dir, max(1, cores // local_processes(name, processes)))
