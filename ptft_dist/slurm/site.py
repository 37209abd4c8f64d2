"""Site profiles: what is particular to a cluster, in a YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ptft_dist.config.section import Section
from ptft_dist.config.shipped import find_shipped
from ptft_dist.errors import RecipeError
from ptft_dist.slurm.client import Partition

Word = Annotated[str, Field(pattern=r"^[\w.,:/@%+=\[\]*&|()-]+$")]
"""A value of an #SBATCH line: without spaces, quotes and line ends."""
Name = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]


class Container(Section):
    """The container image in which `ptft` runs."""

    runtime: Literal["apptainer", "pyxis"]
    image: str
    """A path, or for pyxis a name in a registry."""
    mounts: tuple[str, ...] = ()
    """Directories that the container sees, such as /shared or /scratch:/data. Needed for recipe, data and run_dir."""


class CpuJobs(Section):
    """Where work without GPUs runs: `ptft prepare` before training. Keys as in the site profile."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    cpus_per_task: PositiveInt | None = None
    memory: Word | None = None
    options: dict[Word, Word | None] = Field(default_factory=dict)
    time: Word | None = None
    """The time limit of such a job."""


class Site(Section):
    """What is particular to a cluster. Every key may be left out."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    reservation: Word | None = None
    gpus: Literal["gpus-per-node", "gres"] | None = None
    """How GPUs are asked for: --gpus-per-node=N or --gres=gpu:N. Default: the nodes have no GPUs."""
    gpu_type: Word | None = None
    """The type of GPU in this request, such as a100."""
    cpus_per_task: PositiveInt | None = None
    """CPUs of each node."""
    memory: Word | None = None
    """Memory of each node, such as 64G; 0 is all of it."""
    options: dict[Word, Word | None] = Field(default_factory=dict)
    """Other options of sbatch, without the leading --; null for an option without a value."""
    modules: tuple[Word, ...] = ()
    """Modules to load."""
    setup: str = ""
    """Shell commands that make `ptft` available, such as: source /shared/venv/bin/activate. They are not quoted."""
    variables: dict[Name, str] = Field(default_factory=dict)
    """Environment variables, such as GLOO_SOCKET_IFNAME. No secrets: they are written into the script."""
    cache: str | None = None
    """PTFT_CACHE: a directory that all nodes share."""
    offline: bool = False
    """The nodes do not reach the Hub."""
    lead_s: PositiveInt = 120
    """Seconds between the signal and the time limit, in which a checkpoint must be written."""
    requeue: bool = True
    """Whether a job may requeue itself."""
    requeues: PositiveInt = 100
    """The most requeues of a job."""
    starter: Literal["accelerate", "srun"] = "accelerate"
    """What starts the processes of a node: `accelerate launch`, or srun with one task for each process."""
    container: Container | None = None
    cpu_jobs: CpuJobs = Field(default_factory=CpuJobs)
    """What differs for work without GPUs."""

    def without_gpus(self) -> Site:
        """The profile of jobs without GPUs."""
        own = self.cpu_jobs.model_dump(exclude={"time"}, exclude_unset=True)
        return self.model_copy(update={"gpus": None, "gpu_type": None, **own})


def read_site(name: str) -> Site:
    """Read a site profile. name: a file, or the name of a shipped one.

    Raises:
        RecipeError: there is no such file, or its keys or values are wrong; all of them are named.
    """
    path = find_shipped("slurm", name, ".yaml")
    try:
        values = YAML(typ="safe").load(path)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise RecipeError(f"{path}: the site profile cannot be read: {error}") from None
    if not isinstance(values, dict | None):
        raise RecipeError(f"{path}: a site profile consists of `key: value` lines")
    try:
        return Site.model_validate(values or {})
    except ValidationError as error:
        lines = [f"{path}: {_explained(each['type'], each['loc'], each['msg'])}" for each in error.errors()]
        raise RecipeError("\n".join(lines)) from None


def proposed(known: Mapping[str, Partition]) -> str:
    """A site profile for a cluster with these partitions: for that with the most GPUs, or else the default one."""
    best = max(known.values(), key=lambda each: (each.gpus * each.nodes, each.is_default))
    lines = ["# A site profile; docs/slurm.md describes all keys. The partitions of this cluster:"]
    for each in known.values():
        limit = "no time limit" if each.limit_s is None else f"at most {each.limit_s / 3600:g} h"
        default = ", the default" if each.is_default else ""
        lines.append(
            f"#   {each.name}: {each.nodes} nodes with {each.cpus} CPUs and {each.gpus} GPUs, {limit}{default}"
        )
    lines += [f"partition: {best.name}", "# account: project"]
    lines += ["gpus: gpus-per-node"] if best.gpus else []
    lines += [f"cpus_per_task: {best.cpus}", "# setup: source /shared/venv/bin/activate", "# cache: /shared/ptft-cache"]
    return "\n".join(lines) + "\n"


def _explained(kind: str, place: tuple[int | str, ...], message: str) -> str:
    key = ".".join(str(part) for part in place if part != "[key]")
    if kind == "extra_forbidden":
        *section, name = key.split(".")
        sections: dict[str, type[Section]] = {"container": Container, "cpu_jobs": CpuJobs}
        near = get_close_matches(name, sections.get(section[0] if section else "", Site).model_fields, n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if kind == "string_pattern_mismatch":
        return f"{key}: a value without spaces, quotes and line ends is needed here"
    return f"{key}: {message}"
