"""What is to be submitted: jobs that may wait for each other, checked before the first one is queued."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ptft_dist.config.load import Loaded
from ptft_dist.errors import PtftError, RecipeError
from ptft_dist.slurm import checks, jobs
from ptft_dist.slurm.client import SlurmError, ask, associations, partitions
from ptft_dist.slurm.render import Job, render
from ptft_dist.slurm.site import Site

_NO_LAUNCH = "--launch: needed on several nodes, such as multi_gpu, zero3 or cpu"
_ALL_FOLDS = (
    "data.folds: every task of srun would train all folds (starter: srun in the site profile). Submit them as a job "
    "array with --array, or choose one with data.fold"
)


@dataclass(frozen=True)
class Resources:
    """What a job asks for."""

    launch: str | None = None
    """A launch config. Default: none for one process, otherwise multi_gpu with GPUs, or cpu."""
    nodes: int = 1
    gpus_per_node: int | None = None
    processes_per_node: int | None = None
    time: str | None = None
    options: tuple[str, ...] = ()
    """Other options of `ptft train`."""
    prepare_tasks: int | None = None
    """The data are prepared before, by a job array of so many tasks that share the shards. None: by one task, for a
    job with GPUs; otherwise by the job itself."""

    @property
    def launch_config(self) -> str | None:
        if self.launch is not None or self.nodes * (self.processes_per_node or self.gpus_per_node or 1) == 1:
            return self.launch
        return "multi_gpu" if self.gpus_per_node else "cpu"


@dataclass(frozen=True)
class Request:
    """A job that is not submitted yet."""

    name: str
    job: Job
    site: Site
    run_dirs: tuple[Path, ...]
    """Those that remember this job as theirs: one, or one for each task of a job array; none if it does not train."""
    needs: tuple[str, ...] = ()
    """Names of earlier requests that must succeed before."""
    problems: tuple[str, ...] = field(default=())
    """What is wrong with its recipe, data or launch config."""


def training(
    name: str,
    recipes: Sequence[Loaded],
    commands: Sequence[Sequence[str]],
    run_dirs: Sequence[Path],
    resources: Resources,
    site: Site,
    *,
    after: Sequence[str] = (),
    needs: Sequence[str] = (),
    known: bool = True,
) -> list[Request]:
    """The job that trains a recipe, after a job that prepares its data if they are not in the cache.

    Without GPUs the job itself prepares the data, unless `resources` names a number of tasks.

    Args:
        recipes: one, or several for a job array, which differ in nothing that a check looks at.
        commands: for each recipe, the words after `ptft train`, without the launch config.
        run_dirs: for each recipe, its run directory, absolute.
        after: ids of jobs that must have succeeded before.
        needs: as in Request.
        known: the data and models of the recipe exist already, so that they can be checked.
    """
    own = run_dirs[0] if len(commands) == 1 else run_dirs[0].parent
    config = resources.launch_config
    launch = () if config is None else ("--launch", config)
    job = Job(
        commands=[("train", *words, *launch, *resources.options) for words in commands],
        folder=Path.cwd(),
        log=own / jobs.FOLDER,
        name=own.name,
        nodes=resources.nodes,
        gpus_per_node=resources.gpus_per_node,
        processes_per_node=resources.processes_per_node,
        time=resources.time,
        after=tuple(after),
    )
    problems = [] if resources.launch or resources.nodes == 1 else [_NO_LAUNCH]
    problems += [_ALL_FOLDS] if site.starter == "srun" and job.launched and recipes[0].recipe.data.all_folds else []
    problems += checks.of_recipe(job, recipes[0], config, data=known, offline=site.offline)
    by_itself = resources.gpus_per_node is None and resources.prepare_tasks is None
    if by_itself or (known and all(map(checks.is_prepared, recipes))):
        return [Request(name, job, site, tuple(run_dirs), tuple(needs), tuple(problems))]
    before = replace(
        job,
        commands=[("prepare", *words) for words in commands for _ in range(resources.prepare_tasks or 1)],
        name=f"{job.name}-prepare",
        file="prepare.sbatch",
        nodes=1,
        gpus_per_node=None,
        time=site.cpu_jobs.time,
    )
    preparing = Request(f"{name}: prepare", before, site.without_gpus(), (), tuple(needs))
    return [preparing, Request(name, job, site, tuple(run_dirs), (preparing.name,), tuple(problems))]


def check(requests: Sequence[Request], *, ask_slurm: bool) -> None:
    """Raises RecipeError with all problems of the requests, SlurmError if Slurm does not answer."""
    known, accounts = (partitions(), associations()) if ask_slurm else ({}, None)
    found = []
    for request in requests:
        problems = list(request.problems)
        try:
            render(request.job, request.site)
        except PtftError as error:
            problems.append(str(error))
        if ask_slurm:
            problems += checks.of_cluster(request.job, request.site, known)
            problems += checks.of_accounts(request.site, accounts)
            problems += checks.of_run_dirs(request.job, request.run_dirs)
        name = f"{request.name}: " if len(requests) > 1 else ""
        found += [f"  {name}{problem}" for problem in problems]
    if found:
        raise RecipeError("nothing was submitted:\n" + "\n".join(found))


def submit_all(requests: Sequence[Request]) -> dict[str, str]:
    """Submit the jobs; name -> id. If one is refused, those before it are cancelled. Raises SlurmError, RecipeError."""
    numbers: dict[str, str] = {}
    for request in requests:
        after = (*request.job.after, *(numbers[name] for name in request.needs))
        job = replace(request.job, after=after)
        try:
            numbers[request.name] = jobs.submit(job, render(job, request.site), request.run_dirs)
        except PtftError as error:
            if numbers:
                ask("scancel", *numbers.values())
            raise SlurmError(f"{request.name}: {error}. Nothing is queued") from None
    return numbers
