"""`ptft submit`, `status`, `logs` and `cancel`: runs as Slurm jobs. They import no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ptft_dist.errors import RecipeError

_RUN = typer.Argument(help="The run directory, or the id of its job.")


def submit(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe such as clm.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as optim.lr=1e-4.")] = None,
    site: Annotated[str, typer.Option(help="A site profile: a file, or a shipped one such as cpu or gpu.")] = "cpu",
    launch: Annotated[
        str | None, typer.Option(help="A launch config, such as zero3. Default: multi_gpu, or cpu without GPUs.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of each node, one process for each.")] = None,
    processes_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes of each node. Default: one for each GPU, or one.")
    ] = None,
    time: Annotated[str | None, typer.Option(help="The time limit of a start, such as 24:00:00 or 2-00:00:00.")] = None,
    after: Annotated[
        list[str] | None, typer.Option(help="The id of a job that must have succeeded before (repeatable).")
    ] = None,
    array: Annotated[bool, typer.Option("--array", help="The folds of the recipe as a job array.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, and submit nothing.")] = False,
) -> None:
    """Train a recipe as a Slurm job, which requeues and resumes itself."""
    from ptft_dist.api import load_recipe
    from ptft_dist.runs.on_slurm import fold_requests
    from ptft_dist.slurm.render import render
    from ptft_dist.slurm.requests import Resources, problems_of, submit_all, training
    from ptft_dist.slurm.site import read_site

    loaded, profile, words = load_recipe(recipe, overrides or []), read_site(site), [recipe, *(overrides or [])]
    asked = Resources(launch, nodes, gpus_per_node, processes_per_node, time)
    run_dir = Path(loaded.recipe.run_dir).absolute()
    if array:
        requests = fold_requests(loaded, recipe, overrides or [], asked, profile, after or [])
    else:
        requests = training("train", loaded, [words], [run_dir], asked, profile, after=after or [])
    if problems := problems_of(requests, ask_slurm=not dry_run):
        raise RecipeError("nothing was submitted:\n" + "\n".join(f"  {problem}" for problem in problems))
    if dry_run:
        print("\n".join(render(request.job, request.site) for request in requests), end="")
        return
    numbers = submit_all(requests)
    for request in requests:
        job = request.job
        print(f"job {numbers[request.name]}: {job.processes} processes on {job.nodes} nodes, script {job.script}")
    for verb in ("status", "logs -f", "cancel"):
        print(f"  ptft {verb} {loaded.recipe.run_dir}{'/fold-0' if array else ''}")


def status(
    run: Annotated[str | None, typer.Argument(help="A run directory, a pipeline's, or the id of a job.")] = None,
) -> None:
    """Show the Slurm job of a run: its state, update and checkpoint, and how its starts have ended.

    Of a pipeline: the state of each stage. Without an argument: all jobs of yours.
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
    task: Annotated[int | None, typer.Option(min=0, help="Only the lines of this node; with srun: this rank.")] = None,
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
