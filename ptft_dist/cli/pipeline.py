"""`ptft pipeline`: stages that build on each other, here or as a chain of Slurm jobs."""

from __future__ import annotations

import shlex
import shutil
from typing import TYPE_CHECKING, Annotated

import typer

from ptft_dist.errors import RecipeError

if TYPE_CHECKING:
    from ptft_dist.runs.pipeline import Pipeline


def pipeline(
    file: Annotated[str, typer.Argument(help="A pipeline file, or the name of a shipped one such as demo.")],
    out: Annotated[str | None, typer.Option(help="The directory of all stages, in place of that of the file.")] = None,
    launch: Annotated[str | None, typer.Option(help="A launch config for the stages that name none.")] = None,
    processes: Annotated[int | None, typer.Option(min=1, help="Processes of a stage; not with --submit.")] = None,
    again: Annotated[
        list[str] | None,
        typer.Option(help="A stage to do again, with all that depend on it (repeatable). The old one is moved aside."),
    ] = None,
    submit: Annotated[bool, typer.Option("--submit", help="Submit the stages as Slurm jobs.")] = False,
    site: Annotated[str | None, typer.Option(help="A site profile, for --submit. Default: cpu.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
) -> None:
    """Run all stages of a pipeline that are not done: train, learn a tokenizer, evaluate.

    The same command continues after a failure or a stop.
    """
    from ptft_dist.reporting.messages import say, show_messages
    from ptft_dist.runs.local import LocalExecutor
    from ptft_dist.runs.pipeline import read_pipeline, run_here, stage_options, table

    show_messages()
    stages = read_pipeline(file, out, again or ())
    if submit:
        if processes is not None:
            raise RecipeError("--processes: without effect with --submit; set job.processes_per_node of a stage")
        _submit(stages, site or "cpu", launch, dry_run=dry_run)
        return
    if site is not None:
        raise RecipeError("--site: without effect without --submit")
    given = [("--launch", launch), ("--processes", processes)]
    options = [word for name, value in given if value is not None for word in (name, str(value))]
    if dry_run:
        for stage in stages.stages:
            if stage.name not in stages.again and stages.is_done(stage):
                print(f"{stage.name:12} done")
                continue
            if stage.name not in stages.again:
                stages.require_startable(stage)
            print(f"{stage.name:12} {shlex.join(['ptft', *stage.command, *stage_options(stage, options)])}")
        return
    executor = LocalExecutor()
    with executor.forwarding_signals():
        code = run_here(stages, executor, options)
    if code == 0:
        for line in table(stages):
            say(line)
    raise typer.Exit(code)


def _submit(stages: Pipeline, site: str, launch: str | None, *, dry_run: bool) -> None:
    from ptft_dist.runs.on_slurm import stage_requests
    from ptft_dist.slurm.requests import check, submit_all
    from ptft_dist.slurm.site import read_site

    requests = stage_requests(stages, read_site(site), launch)
    check(requests, ask_slurm=not dry_run)
    if dry_run:
        for request in requests:
            print(f"{request.name:20} after {', '.join(request.needs) or 'nothing'}")
        return
    moved = stages.set_aside()
    try:
        for stage in stages.stages:
            if stage.name in {request.name for request in requests}:
                stages.begin(stage)
        numbers = submit_all(requests)
    except BaseException:
        for before, now in moved:
            shutil.rmtree(before, ignore_errors=True)  # only what `begin` has written
            now.rename(before)
        raise
    for name, number in numbers.items():
        print(f"job {number}: {name}")
    print(f"  ptft status {shlex.quote(str(stages.out))}")
