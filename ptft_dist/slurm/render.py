"""Batch scripts from slurm/job.sbatch.j2: pure functions from what is asked for to a string.

Nothing that a user names can add an #SBATCH line or a command: values of #SBATCH lines are checked words, and all
others are quoted and stand after the first command, where sbatch reads no more options.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ptft_dist.config.shipped import shipped
from ptft_dist.errors import RecipeError
from ptft_dist.slurm.site import Site

_PLAIN_PATH = re.compile(r"[\w./+,@:=-]+")
_TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}")


@dataclass(frozen=True)
class Job:
    """What a user asks for."""

    words: Sequence[str]
    """The arguments of `ptft train`: recipe, overrides, launch config."""
    folder: Path
    """The current directory of the job, absolute."""
    log: Path
    """The directory of its script and its logs, absolute."""
    name: str
    nodes: int = 1
    gpus_per_node: int | None = None
    processes_per_node: int | None = None
    """Default: one for each GPU, or one."""
    time: str | None = None
    """The time limit: D-HH:MM:SS, HH:MM:SS, MM:SS or MM."""
    dependency: str | None = None
    """The id of a job that must have succeeded before."""

    def __post_init__(self) -> None:
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise RecipeError(f"--time: {self.time!r}; expected D-HH:MM:SS, HH:MM:SS, MM:SS or minutes")
        if self.dependency is not None and not self.dependency.replace("_", "").isdigit():
            raise RecipeError(f"--after: {self.dependency!r}; expected the id of a job")

    @property
    def script(self) -> Path:
        return self.log / "job.sbatch"

    @property
    def processes(self) -> int:
        """Over all nodes."""
        return self.nodes * (self.processes_per_node or self.gpus_per_node or 1)


def render(job: Job, site: Site) -> str:
    """The batch script of a job. Raises RecipeError if the site has no GPUs and the job asks for some."""
    options = [f"job-name={re.sub(r'[^A-Za-z0-9._-]', '_', job.name)[:64] or 'ptft'}", f"nodes={job.nodes}"]
    options += ["ntasks-per-node=1"]
    for key in ("partition", "account", "qos", "constraint", "reservation"):
        if (value := getattr(site, key)) is not None:
            options.append(f"{key}={value}")
    if job.gpus_per_node:
        if site.gpus is None:
            raise RecipeError("--gpus-per-node: the site profile does not say how GPUs are asked for; set its key gpus")
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        request = "gpus-per-node=" if site.gpus == "gpus-per-node" else "gres=gpu:"
        options.append(f"{request}{kind}{job.gpus_per_node}")
    for name, value in (("cpus-per-task", site.cpus_per_task), ("mem", site.memory), ("time", job.time)):
        if value is not None:
            options.append(f"{name}={value}")
    if job.dependency is not None:
        options.append(f"dependency=afterok:{job.dependency}")
    options += [f"signal=TERM@{site.lead_s}", "requeue" if site.requeue else "no-requeue", "open-mode=append"]
    options += [name if value is None else f"{name}={value}" for name, value in site.options.items()]
    if _PLAIN_PATH.fullmatch(str(job.log)):  # otherwise `ptft submit` gives it to sbatch
        options.append(f"output={job.log}/%j.log")
    variables = dict(site.variables)
    if site.cache is not None:
        variables["PTFT_CACHE"] = site.cache
    if site.offline:
        variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return _filled(
        file=_printable(job.script),
        options=options,
        modules=[shlex.quote(module) for module in site.modules],
        setup=site.setup.strip("\n"),
        variables=[(name, shlex.quote(value)) for name, value in variables.items()],
        folder=shlex.quote(str(job.folder)),
        words=" ".join(map(shlex.quote, job.words)),
        complaint=shlex.quote("ptft is not on the PATH; set modules or setup in the site profile"),
        per_node=job.processes // job.nodes,
    )


def hand_written() -> str:
    """slurm/train.sbatch, for those who want no submit command: the recipe is an argument of sbatch."""
    options = ["job-name=ptft", "ntasks-per-node=1", "signal=TERM@120", "requeue", "open-mode=append"]
    return _filled(
        file="",
        options=[*options, "output=%x-%j.log"],
        modules=(),
        setup="",
        variables=(),
        folder="",
        words="",
        complaint='"train.sbatch: ptft is not on the PATH; activate its environment before sbatch"',
        per_node="${PROCESSES_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}",
    )


def _filled(**values: Any) -> str:
    loader = FileSystemLoader(shipped("slurm"))
    environment = Environment(
        loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template("job.sbatch.j2").render(values)


def _printable(path: Path) -> str:
    """For a comment, which must stay on one line."""
    return shlex.quote("".join(letter if letter.isprintable() else "?" for letter in str(path)))
