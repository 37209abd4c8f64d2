"""`ptft submit`, `status`, `logs` and `cancel`: runs as Slurm jobs. They import no torch."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

_RUN = typer.Argument(help="The run directory, or the id of its job.")


def submit(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe such as clm.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as optim.lr=1e-4.")] = None,
    site: Annotated[str, typer.Option(help="A site profile: a file, or a shipped one such as cpu or gpu.")] = "cpu",
    launch: Annotated[
        str | None,
        typer.Option(help="A launch config, such as zero3. Needed on several nodes."),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of each node, one process for each.")] = None,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes of each node. Default: one for each GPU, or one.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="The time limit of a start, such as 24:00:00 or 2-00:00:00.")] = None,
    after: Annotated[
        list[str] | None, typer.Option(help="Start after the job with this id has succeeded (repeatable).")
    ] = None,
    resume: Annotated[str, typer.Option(help="As of ptft train; for the first start only.")] = "auto",
    accept: Annotated[
        list[str] | None, typer.Option(help="A key that may differ from the checkpoint (repeatable).")
    ] = None,
    array: Annotated[bool, typer.Option("--array", help="The folds of the recipe as a job array.")] = False,
    sweep: Annotated[
        str | None, typer.Option(metavar="SEARCH", help="The trials of a search (see ptft sweep) as a job array.")
    ] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Trials of a sweep at the same time. Default: 4.")] = None,
    prepare_tasks: Annotated[
        int | None,
        typer.Option(min=1, help="Prepare the data before, with a job array of this many tasks. Default with GPUs: 1."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, and submit nothing.")] = False,
) -> None:
    """Submit training as a Slurm job that requeues itself and resumes."""
    from ptft_dist.api import load_recipe
    from ptft_dist.errors import RecipeError
    from ptft_dist.reporting.messages import counted
    from ptft_dist.runs.folds import check_resume
    from ptft_dist.slurm.render import render
    from ptft_dist.slurm.requests import Resources, check, submit_all, training
    from ptft_dist.slurm.site import read_site

    loaded = load_recipe(recipe, overrides or [], training=True)
    profile, words = read_site(site), [recipe, *(overrides or [])]
    options = [*(["--resume", resume] if resume != "auto" else []), *(f"--accept={key}" for key in accept or ())]
    asked = Resources(launch, nodes, gpus_per_node, processes_per_node, time, tuple(options), prepare_tasks)
    run_dir = Path(loaded.recipe.run_dir).absolute()
    if array and sweep is not None:
        raise RecipeError("--array, --sweep: folds or trials; give one of them")
    if loaded.recipe.data.all_folds:
        check_resume(resume)
    if tasks is not None and sweep is None:
        raise RecipeError("--tasks: no effect without --sweep SEARCH")
    if sweep is not None:
        from ptft_dist.runs.on_slurm import sweep_requests

        requests = sweep_requests(loaded, recipe, sweep, overrides or [], asked, profile, after or [], tasks or 4)
    elif array:
        from ptft_dist.runs.on_slurm import fold_requests

        requests = fold_requests(loaded, recipe, overrides or [], asked, profile, after or [])
    else:
        requests = training("train", [loaded], [words], [run_dir], asked, profile, after=after or [])
    check(requests, ask_slurm=not dry_run)
    if dry_run:
        print("\n".join(render(request.job, request.site) for request in requests), end="")
        return
    numbers = submit_all(requests)
    for request in requests:
        job = request.job
        size = f"{job.processes} process{'es' * (job.processes != 1)} on {counted(job.nodes, 'node')}"
        what = size if job.trains else job.commands[0][0]
        print(f"job {numbers[request.name]}: {what}, script {job.script}")
    for verb in ("status", "logs -f", "cancel"):
        part = "/fold-0" if array else "/worker-0" if sweep is not None and verb == "logs -f" else ""
        print(f"  ptft {verb} {shlex.quote(loaded.recipe.run_dir + part)}")


def status(
    run: Annotated[str | None, typer.Argument(help="A run directory, a pipeline's, or the id of a job.")] = None,
) -> None:
    """Show the Slurm job of a run: its state, update and checkpoint, and how its starts have ended.

    Of a pipeline: the state of each stage. Without an argument: your queued and running jobs.
    """
    from ptft_dist.slurm import jobs

    if run is None:
        for number, state, clock, run_dir in jobs.waiting_and_running():
            print(f"{number:<11} {state:<11} {clock:<22} {run_dir}")
        return
    for name, text in jobs.status(jobs.find_run(run)):
        print(f"{name:<11} {text}")


def logs(
    run: Annotated[str, _RUN],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
    task: Annotated[
        int | None, typer.Option(min=0, help="Only this node, from 0; with starter srun: this rank.")
    ] = None,
) -> None:
    """Print the log of a run's Slurm job."""
    from ptft_dist.slurm import jobs

    for text in jobs.log_lines(jobs.find_run(run), follow=follow, task=task):
        sys.stdout.write(text)
        sys.stdout.flush()


def cancel(run: Annotated[str, _RUN]) -> None:
    """End the Slurm job of a run; it saves a checkpoint first, and is not requeued."""
    from ptft_dist.slurm import jobs

    print(jobs.cancel(jobs.find_run(run)))
