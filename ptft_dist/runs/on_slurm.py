"""Lists of runs as Slurm jobs: folds and sweeps as a job array, the stages of a pipeline as a chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ptft_dist.api import missing_offline
from ptft_dist.config.load import Loaded
from ptft_dist.errors import RecipeError
from ptft_dist.runs.folds import fold_runs
from ptft_dist.runs.pipeline import Pipeline, Stage
from ptft_dist.runs.search import check_search, read_search
from ptft_dist.slurm import jobs
from ptft_dist.slurm.client import ENDED, job_facts
from ptft_dist.slurm.render import Job
from ptft_dist.slurm.requests import Request, Resources, training
from ptft_dist.slurm.site import Site

TABLE = "table"


def fold_requests(
    loaded: Loaded, recipe: str, overrides: Sequence[str], resources: Resources, site: Site, after: Sequence[str]
) -> list[Request]:
    """A job array with one task for each fold, and a job that then writes the table of their metrics.

    Raises RecipeError if the recipe has no folds.
    """
    if not loaded.recipe.data.all_folds:
        raise RecipeError("--array: the recipe has one run; data.folds: K makes K runs of it")
    runs = fold_runs(loaded, recipe, overrides)
    run_dirs = [run.run_dir.absolute() for run in runs]
    folds = [run.load() for run in runs]
    words = [run.words for run in runs]
    found = training("folds", folds, words, run_dirs, resources, site, after=after)
    array = found[-1]
    table = replace(
        array.job,
        commands=[("folds", recipe, *overrides)],
        name=f"{array.job.name}-{TABLE}",
        file=f"{TABLE}.sbatch",
        nodes=1,
        gpus_per_node=None,
        time=site.cpu_jobs.time,
        after=(),
    )
    return [*found, Request(TABLE, table, site.without_gpus(), (), (array.name,))]


def sweep_requests(
    loaded: Loaded,
    recipe: str,
    search: str,
    overrides: Sequence[str],
    resources: Resources,
    site: Site,
    after: Sequence[str],
    tasks: int,
) -> list[Request]:
    """A job array whose tasks take the trials of a sweep from one study; the last one writes the table.

    Raises RecipeError if the search does not fit the recipe, or if a trial would need several nodes.
    """
    check_search(read_search(search), recipe, overrides)
    if resources.nodes > 1:
        raise RecipeError("--nodes: each trial of a sweep runs on one node. --tasks says how many run at the same time")
    if resources.options:
        raise RecipeError("--resume, --accept: no effect on the trials of a sweep, which always resume")
    folder, config = Path(loaded.recipe.run_dir).absolute(), resources.launch_config
    found = training("sweep", [loaded], [[recipe, *overrides]], [folder], resources, site, after=after)
    job = found[-1].job
    launch = () if config is None else ("--launch", config, "--processes", str(job.per_node))
    words = ("sweep", recipe, search, *overrides, "--out", str(folder), *launch)
    workers = tuple(folder / f"worker-{task}" for task in range(tasks))
    return [*found[:-1], replace(found[-1], job=replace(job, commands=[words] * tasks), run_dirs=workers)]


def stage_requests(pipeline: Pipeline, site: Site, launch: str | None) -> list[Request]:
    """The jobs of all stages that are not done. A stage waits for the jobs of the stages that it refers to.

    A stage that is already queued with the same recipe and data keeps its job.

    Args:
        launch: a launch config for the stages that name none.

    Raises:
        RecipeError: a stage cannot be started, or its job is of an older version of it.
    """
    found: list[Request] = []
    queued: dict[str, str] = {}
    for stage in pipeline.stages:
        number = jobs.job_of(stage.folder)
        if number is not None and (facts := job_facts(number)) is not None and facts["JobState"] not in ENDED:
            if stage.name in pipeline.again or not pipeline.is_recorded(stage):
                raise RecipeError(f"stage {stage.name}: its job {number} has not ended; end it with ptft cancel")
            queued[stage.name] = number
            continue
        if stage.name not in pipeline.again:
            if pipeline.is_done(stage):
                continue
            pipeline.require_startable(stage)
        after = [queued[name] for name in stage.references if name in queued]
        needs = [name for name in stage.references if name in {request.name for request in found}]
        found += _requests(stage, site, launch, after, needs, known=not needs and not after)
    return found


def _requests(
    stage: Stage, site: Site, launch: str | None, after: list[str], needs: list[str], *, known: bool
) -> list[Request]:
    asked = stage.settings.job
    resources = Resources(
        launch=stage.settings.launch or launch,
        nodes=asked.nodes,
        gpus_per_node=asked.gpus_per_node,
        processes_per_node=asked.processes_per_node,
        time=asked.time,
    )
    verb, *words = stage.command
    if verb == "train":
        return training(
            stage.name, [stage.load()], [words], [stage.folder], resources, site, after=after, needs=needs, known=known
        )
    own = site if asked.gpus_per_node else site.without_gpus()
    missing = missing_offline(stage.load()) if site.offline else []
    job = Job(
        commands=[stage.command],
        folder=Path.cwd(),
        log=stage.folder / jobs.FOLDER,
        name=stage.name,
        gpus_per_node=asked.gpus_per_node,
        time=asked.time or (None if asked.gpus_per_node else site.cpu_jobs.time),
        after=tuple(after),
    )
    return [Request(stage.name, job, own, (stage.folder,), tuple(needs), tuple(missing))]
