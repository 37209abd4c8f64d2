"""Checks before a job is queued. They find all problems at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from ptft_dist.config.load import Loaded
from ptft_dist.config.resolve import batch_shape
from ptft_dist.data.sources import check_sources
from ptft_dist.errors import PtftError, RecipeError
from ptft_dist.launch.launch_file import read_launch_file
from ptft_dist.launch.settings import check_settings
from ptft_dist.slurm.client import ENDED, Partition, job_facts, seconds
from ptft_dist.slurm.jobs import job_of, with_jobs
from ptft_dist.slurm.render import Job
from ptft_dist.slurm.site import Site
from ptft_dist.tasks.registry import encoder_class


def of_recipe(job: Job, loaded: Loaded, launch: str | None, *, data: bool, offline: bool) -> list[str]:
    """The problems of recipe, launch config, data and models.

    Args:
        data: the data and models exist already.
        offline: the nodes do not reach the Hub.
    """

    def launch_config() -> None:
        if launch is None:
            return
        file = read_launch_file(launch)
        check_settings(file.settings, loaded.recipe)
        if file.distributed_type == "NO" and job.processes > 1:
            raise RecipeError(f"--launch {launch}: it starts one process, and the job has {job.processes}")

    found = [launch_config, lambda: batch_shape(loaded.recipe, job.processes)]
    if data:
        found.append(lambda: check_sources(loaded.recipe, loaded.base))
    if offline:
        from ptft_dist.hub import missing_offline

        found.append(lambda: _raise(missing_offline(loaded)))
    return [str(error) for check in found if (error := _error_of(check)) is not None]


def _raise(problems: list[str]) -> None:
    if problems:
        raise RecipeError("\n  ".join([*problems, "ptft prefetch fetches them, on a node with internet"]))


def is_prepared(loaded: Loaded) -> bool:
    """Whether the cache has the data of the recipe. No, if the sources cannot be found at all."""
    from ptft_dist.data.prepare import is_prepared as prepared  # slow to import, and needed on GPUs only

    try:
        return prepared(loaded.recipe, loaded.base, encoder_class(loaded.recipe.task))
    except PtftError:
        return False


def of_cluster(job: Job, site: Site, known: dict[str, Partition]) -> Iterator[str]:
    """The problems that would keep the job in the queue for ever, or end it there."""
    default = [each.name for each in known.values() if each.is_default]
    wanted = default if site.partition is None else site.partition.split(",")
    if not wanted:
        yield f"partition: this cluster has no default; set one in the site profile: {', '.join(known)}"
    if unknown := [name for name in wanted if name not in known]:
        yield from (
            f"partition: this cluster has none with the name {name!r}; it has {', '.join(known)}" for name in unknown
        )
        return
    lacking = [list(_of_partition(job, site, known[name])) for name in wanted]
    if all(lacking):  # otherwise Slurm starts it in one that lacks nothing
        yield from (problem for each in lacking for problem in each)
    if job.time is not None and (limit := seconds(job.time)) is not None and limit <= site.lead_s:
        yield f"--time: {job.time}; the warning comes {site.lead_s} s before its end (lead_s), so nothing is trained"


def _of_partition(job: Job, site: Site, partition: Partition) -> Iterator[str]:
    """What a partition lacks for the job."""
    at = f"partition {partition.name}"
    if job.nodes > partition.nodes:
        yield f"--nodes: {job.nodes}; {at} has {partition.nodes}"
    if (job.gpus_per_node or 0) > partition.gpus:
        yield f"--gpus-per-node: {job.gpus_per_node}; a node of {at} has {partition.gpus}"
    if site.cpus_per_task is not None and site.cpus_per_task > partition.cpus:
        yield f"cpus_per_task: {site.cpus_per_task}; a node of {at} has {partition.cpus}"
    wanted = None if job.time is None else seconds(job.time)
    if wanted is not None and partition.limit_s is not None and wanted > partition.limit_s:
        yield f"--time: {job.time}; {at} allows {partition.limit_s // 3600} h {partition.limit_s % 3600 // 60} min"


def of_accounts(site: Site, known: Mapping[str, set[str]] | None) -> Iterator[str]:
    """An account or a qos that this user does not have. known: see `associations`."""
    if known is None:
        return
    if site.account is not None and site.account not in known:
        yield f"account: {site.account}; you have {', '.join(sorted(known))}"
        return
    allowed = set().union(*known.values()) if site.account is None else known[site.account]
    if site.qos is not None and allowed and site.qos not in allowed:
        yield f"qos: {site.qos}; you may use {', '.join(sorted(allowed))}"


def of_run_dirs(job: Job, run_dirs: Sequence[Path]) -> Iterator[str]:
    """Other jobs that train in the directory of this one, or in those of the tasks of its array.

    run_dirs: as in Request.
    """
    for run_dir in dict.fromkeys([*with_jobs(job.log.parent), *run_dirs]) if run_dirs else ():
        number = job_of(run_dir)
        facts = None if number is None else job_facts(number)
        if facts is not None and facts["JobState"] not in ENDED:
            taken = f"run_dir: job {number} ({facts['JobState']}) has it: {run_dir}"
            yield f"{taken}; end it with ptft cancel, or choose another"


def _error_of(check: Callable[[], object]) -> PtftError | None:
    try:
        check()
    except PtftError as error:
        return error
    return None
