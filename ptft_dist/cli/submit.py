"""`ptft submit`, `status`, `logs` and `cancel`: runs as Slurm jobs. They import no torch."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ptft_dist.errors import RecipeError

_RUN = typer.Argument(help="The run directory.")


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
    after: Annotated[str | None, typer.Option(help="The id of a job that must have succeeded before.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the script, and submit nothing.")] = False,
) -> None:
    """Train a recipe as a Slurm job, which requeues and resumes itself."""
    from ptft_dist.api import load_recipe
    from ptft_dist.data.sources import check_sources
    from ptft_dist.slurm import checks, jobs
    from ptft_dist.slurm.client import partitions
    from ptft_dist.slurm.render import Job, render
    from ptft_dist.slurm.site import read_site

    loaded, profile = load_recipe(recipe, overrides or []), read_site(site)
    run_dir = Path(loaded.recipe.run_dir).absolute()
    chosen = launch or ("multi_gpu" if gpus_per_node else "cpu")
    job = Job(
        words=[recipe, *(overrides or []), "--launch", chosen],
        folder=Path.cwd(),
        log=run_dir / jobs.FOLDER,
        name=run_dir.name,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        processes_per_node=processes_per_node,
        time=time,
        dependency=after,
    )
    script = render(job, profile)
    problems = checks.of_recipe(job, loaded, chosen, (partial(check_sources, loaded.recipe, loaded.base),))
    if not dry_run:
        problems += [*checks.of_cluster(job, profile, partitions()), *checks.of_run_dir(run_dir)]
    if problems:
        raise RecipeError("nothing was submitted:\n" + "\n".join(f"  {problem}" for problem in problems))
    if dry_run:
        print(script, end="")
        return
    number = jobs.submit(script, run_dir)
    print(f"job {number}: {job.processes} processes on {nodes} nodes, script {job.script}")
    for verb in ("status", "logs -f", "cancel"):
        print(f"  ptft {verb} {loaded.recipe.run_dir}")


def status(run: Annotated[Path, _RUN]) -> None:
    """Show the Slurm job of a run: its state, update and checkpoint, and how its starts have ended."""
    from ptft_dist.slurm import jobs

    for name, text in jobs.status(run):
        print(f"{name:<11} {text}")


def logs(
    run: Annotated[Path, _RUN],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends.")] = False,
) -> None:
    """Print the log of a run's Slurm job."""
    from ptft_dist.slurm import jobs

    for text in jobs.log_lines(run, follow=follow):
        sys.stdout.write(text)
        sys.stdout.flush()


def cancel(run: Annotated[Path, _RUN]) -> None:
    """End the Slurm job of a run; it saves a checkpoint first, and is not requeued."""
    from ptft_dist.slurm import jobs

    print(jobs.cancel(run))
