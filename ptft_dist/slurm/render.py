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

    commands: Sequence[Sequence[str]]
    """The arguments of `ptft`: verb, recipe, overrides, launch config. Several are the tasks of a job array."""
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
    after: Sequence[str] = ()
    """The ids of jobs that must have succeeded before."""
    file: str = "job.sbatch"
    """The name of its script."""

    def __post_init__(self) -> None:
        if self.time is not None and not _TIME.fullmatch(self.time):
            raise RecipeError(f"--time: {self.time!r}; expected D-HH:MM:SS, HH:MM:SS, MM:SS or minutes")
        for other in self.after:
            if not other.replace("_", "").isdigit():
                raise RecipeError(f"--after: {other!r}; expected the id of a job")

    @property
    def script(self) -> Path:
        return self.log / self.file

    @property
    def trains(self) -> bool:
        return self.commands[0][0] == "train"

    @property
    def saves(self) -> bool:
        """Whether it stops before its time limit, and goes on in the next start."""
        return self.commands[0][0] in ("train", "sweep")

    @property
    def launched(self) -> bool:
        """Whether it trains with a launch config. Otherwise `ptft train` itself is the only process."""
        return self.trains and "--launch" in self.commands[0]

    @property
    def per_node(self) -> int:
        """Processes of each node."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def processes(self) -> int:
        """Over all nodes."""
        return self.nodes * self.per_node


def render(job: Job, site: Site) -> str:
    """The batch script of a job.

    Raises RecipeError if the site has no GPUs and the job asks for some, or if its options repeat those of the job.
    """
    variables = dict(site.variables)
    if site.cache is not None:
        variables["PTFT_CACHE"] = site.cache
    if site.offline:
        variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    step, here, container = _container(site, gpus=bool(job.gpus_per_node))
    return _filled(
        commands=[_quoted(command) for command in job.commands],
        trains=job.trains,
        saves=job.saves,
        launched=job.launched,
        starter=site.starter,
        contained=site.container is not None,
        container=container,
        step_options=step,
        here=here,
        limit=f" --limit {site.requeues}",
        file=_printable(job.script),
        script=shlex.quote(str(job.script)),
        log=shlex.quote(str(job.log)),
        options=_options(job, site),
        modules=[shlex.quote(module) for module in site.modules],
        setup=site.setup.strip("\n"),
        variables=[(name, shlex.quote(value)) for name, value in variables.items()],
        folder=shlex.quote(str(job.folder)),
        complaint=shlex.quote("ptft is not on the PATH; set modules or setup in the site profile"),
        per_node=job.per_node,
    )


def _options(job: Job, site: Site) -> list[str]:
    """Those of sbatch, without the leading --."""
    tasks = job.per_node if site.starter == "srun" and job.launched else 1
    cpus = None if site.cpus_per_task is None else max(1, site.cpus_per_task // tasks)
    options = [f"job-name={re.sub(r'[^A-Za-z0-9._-]', '_', job.name)[:64] or 'ptft'}", f"nodes={job.nodes}"]
    options += [f"ntasks-per-node={tasks}"]
    for key in ("partition", "account", "qos", "constraint", "reservation"):
        if (value := getattr(site, key)) is not None:
            options.append(f"{key}={value}")
    if job.gpus_per_node:
        if site.gpus is None:
            raise RecipeError("--gpus-per-node: the site profile does not say how GPUs are asked for; set its key gpus")
        kind = f"{site.gpu_type}:" if site.gpu_type else ""
        request = "gpus-per-node=" if site.gpus == "gpus-per-node" else "gres=gpu:"
        options.append(f"{request}{kind}{job.gpus_per_node}")
    for name, value in (("cpus-per-task", cpus), ("mem", site.memory), ("time", job.time)):
        if value is not None:
            options.append(f"{name}={value}")
    if len(job.commands) > 1:
        options.append(f"array=0-{len(job.commands) - 1}")
    if job.after:
        options += [f"dependency=afterok:{':'.join(job.after)}", "kill-on-invalid-dep=yes"]
    options += [f"signal=TERM@{site.lead_s}", "requeue" if site.requeue else "no-requeue", "open-mode=append"]
    own = {option.partition("=")[0] for option in options} | {"requeue", "no-requeue", "output"}
    if twice := [f"options.{name}" for name in site.options if name in own]:
        raise RecipeError(
            f"{', '.join(twice)}: the script has this option already, and sbatch would read one of both; remove it "
            "from the site profile. Keys of the profile and options of ptft submit set it"
        )
    options += [name if value is None else f"{name}={value}" for name, value in site.options.items()]
    if _PLAIN_PATH.fullmatch(str(job.log)):  # otherwise `ptft submit` gives it to sbatch
        options.append(f"output={job.log}/{'%A_%a' if len(job.commands) > 1 else '%j'}.log")
    return options


def _container(site: Site, *, gpus: bool) -> tuple[str, str, str]:
    """For a site with containers: the options of srun, the words before a command on the first node, and the words
    before a command of a step."""
    if site.container is None:
        return "", "", ""
    mounts = site.container.mounts
    if site.container.runtime == "apptainer":
        words = ["apptainer", "exec", *(["--nv"] if gpus else []), *(f"--bind={each}" for each in mounts)]
        return "", '"${container[@]}" ', _quoted([*words, site.container.image])
    pairs = [each if ":" in each else f"{each}:{each}" for each in mounts]  # PTFT_RUN_FILE
    mounted = [f"--container-mounts={','.join(pairs)}"] if pairs else []
    options = _quoted([f"--container-image={site.container.image}", *mounted])
    return options, f"srun --overlap --nodes=1 --ntasks=1 {options} ", ""


def _quoted(words: Sequence[str]) -> str:
    """Also commas, which shellcheck takes for mistakes in an array."""
    return " ".join(f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word) for word in words)


def hand_written() -> str:
    """slurm/train.sbatch, for those who want no submit command: the recipe is an argument of sbatch."""
    options = ["job-name=ptft", "ntasks-per-node=1", "signal=TERM@120", "requeue", "open-mode=append"]
    return _filled(
        commands=(),
        trains=True,
        saves=True,
        launched=True,
        starter="accelerate",
        contained=False,
        container="",
        step_options="",
        here="",
        limit="",
        file="",
        script="",
        log="",
        options=[*options, "output=%x-%j.log"],
        modules=(),
        setup="",
        variables=(),
        folder="",
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
