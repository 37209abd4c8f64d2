"""`ptft train`: train in this process, or in several through `accelerate launch`."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptft_dist.cli.ranks import end_at_signal
from ptft_dist.errors import RecipeError
from ptft_dist.launch.ending import end_now

if TYPE_CHECKING:
    from ptft_dist.config.load import Loaded
    from ptft_dist.launch.local import Machines


_BEFORE = "before training, so there is nothing to save"


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe such as clm.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as optim.lr=1e-4.")] = None,
    launch: Annotated[
        str | None, typer.Option(help="A launch config: a file, or a shipped one such as multi_gpu, zero2, cpu.")
    ] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes, over all machines.")] = None,
    machines: Annotated[int | None, typer.Option(min=1, help="Machines; run the command on each.")] = None,
    machine_rank: Annotated[int | None, typer.Option(min=0, help="The rank of this machine, from 0.")] = None,
    address: Annotated[str | None, typer.Option(help="HOST:PORT of machine 0, the same on all machines.")] = None,
    starter: Annotated[
        str, typer.Option(help="accelerate: start the processes of this machine. srun: be one that srun has started.")
    ] = "accelerate",
    resume: Annotated[
        str, typer.Option(help="auto (the newest undamaged checkpoint), never, or the path of a checkpoint.")
    ] = "auto",
    accept: Annotated[
        list[str] | None, typer.Option(help="A key that may differ from the checkpoint (repeatable).")
    ] = None,
) -> None:
    """Train a recipe, or resume from the newest checkpoint of its run directory."""
    from ptft_dist.api import load_recipe
    from ptft_dist.launch.environment import place, tell_run_dir
    from ptft_dist.runs.folds import train_folds

    names = ("--launch", "--processes", "--machines", "--machine-rank", "--address")
    values = (launch, processes, machines, machine_rank, address)
    given = {name: str(value) for name, value in zip(names, values, strict=True) if value is not None}
    if given and place().launched:
        raise RecipeError(
            f"{', '.join(given)}: no effect in a process that a launcher has started (LOCAL_RANK is set). Give the "
            "launch config to that launcher, as in: accelerate launch --config_file FILE -m ptft_dist train RECIPE"
        )
    loaded = load_recipe(recipe, overrides or [], training=True)
    tell_run_dir(Path(loaded.recipe.run_dir))
    accepted = [word for key in accept or () for word in ("--accept", key)]
    if starter not in ("accelerate", "srun") or (starter == "srun" and "SLURM_PROCID" not in os.environ):
        raise RecipeError(f"--starter: {starter}: use accelerate, or srun within a task of srun")
    if loaded.recipe.data.all_folds and not place().launched:
        if starter == "srun":
            raise RecipeError(
                "--starter: srun: every task of srun would train all folds. Submit them as a job array with "
                "ptft submit RECIPE --array, or choose one with data.fold"
            )
        options = [*accepted, *(word for option in given.items() for word in option)]
        raise typer.Exit(
            train_folds(loaded, recipe, overrides or [], resume=resume, options=options, writes=not machine_rank)
        )
    if given:
        from ptft_dist.launch.local import machines as which

        arguments = ["train", recipe, *(overrides or []), "--resume", resume, *accepted]
        several = which(machines, machine_rank, address)
        raise typer.Exit(_launch(loaded, launch, processes, several, arguments, by_srun=starter == "srun"))

    raise typer.Exit(_train_rank(loaded, resume, tuple(accept or ())))


def _train_rank(loaded: Loaded, resume: str, accept: tuple[str, ...]) -> int:
    """Train as this process's rank; return the exit code. Failures are already reported."""
    from ptft_dist.launch.environment import place
    from ptft_dist.reporting.messages import show_messages, write_now
    from ptft_dist.training.stopping import ending_at_once

    here = place()
    show_messages(here.rank)
    with ending_at_once(partial(end_at_signal, _BEFORE)):
        from ptft_dist.failures import Failures
        from ptft_dist.run import run

        failures = Failures(Path(loaded.recipe.run_dir), here)
        try:
            result = run(loaded, here, resume=resume, accept=accept, failures=failures)
            code = result.exit_code
            if here.is_main:
                write_now(result.summary, sys.stdout)
        except Exception:
            code = failures.exit_code
    if here.world_size > 1:
        end_now(code)
    return code


def _launch(
    loaded: Loaded,
    launch: str | None,
    processes: int | None,
    several: Machines | None,
    arguments: list[str],
    *,
    by_srun: bool,
) -> int:
    """Check the recipe and prepare the data in this process, then start the ranks; or become one of them."""
    from ptft_dist.config.resolve import batch_shape
    from ptft_dist.data.prepare import prepare
    from ptft_dist.data.sources import check_sources
    from ptft_dist.launch.environment import COMMAND
    from ptft_dist.launch.launch_file import read_launch_file
    from ptft_dist.launch.local import become_rank, command, default_launch, local_processes
    from ptft_dist.launch.local import launch as start
    from ptft_dist.launch.settings import check_settings
    from ptft_dist.reporting.messages import show_messages
    from ptft_dist.reporting.run_files import lock_run_dir, make_run_dir
    from ptft_dist.reporting.trackers import check_installed
    from ptft_dist.tasks.registry import encoder_class
    from ptft_dist.training.stopping import ending_at_once

    show_messages()
    if several is not None and launch is None:
        raise RecipeError("--launch: needed on several machines, such as multi_gpu, zero3 or cpu")
    file = read_launch_file(launch or default_launch())
    check_settings(file.settings, loaded.recipe)
    words = command(file, processes, several, arguments)
    os.environ.setdefault(COMMAND, json.dumps(sys.argv))
    local = local_processes(file, processes, several)
    batch_shape(loaded.recipe, local * (several.count if several else 1))
    check_sources(loaded.recipe, loaded.base)
    check_installed(loaded.recipe.log)
    run_dir = Path(loaded.recipe.run_dir)
    make_run_dir(run_dir)
    if not by_srun and (several is None or several.rank == 0):  # elsewhere rank 0 of this run may have the lock already
        lock_run_dir(run_dir).release()  # only a check, to report the error before the ranks start; rank 0 locks it
    with ending_at_once(partial(end_at_signal, _BEFORE)):
        prepare(loaded.recipe, loaded.base, encoder_class(loaded.recipe.task))  # rank 0 shows the report
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    address = several.address if several else None
    if by_srun and file.distributed_type != "NO":
        become_rank(words, max(1, cores // local), file.variables, address)
    return start(words, run_dir, max(1, cores // local), file.variables, address)
