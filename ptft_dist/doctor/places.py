"""Cores, memory, disks, the host's name, and Slurm."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from ptft_dist.data.cache import cache_root
from ptft_dist.doctor.finding import Finding
from ptft_dist.errors import RecipeError
from ptft_dist.launch.network import Lookups
from ptft_dist.slurm.client import SlurmError, ask, partitions

GB = 1e9
LEAST_DISK, LEAST_SHARED_MEMORY = 10 * GB, 1 * GB
REMOTE = ("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "fuse.sshfs")


def places(folder: Path) -> Iterator[Finding]:
    """Cores and memory; room and kind of the disks of runs, of prepared data and of downloads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory()
    text = f"{cores} cores, {memory.available / GB:.1f} of {memory.total / GB:.1f} GB of memory free"
    yield Finding("machine", "CPU", "ok", text)
    shared = Path("/dev/shm")
    if shared.is_dir() and (size := shutil.disk_usage(shared).total) < LEAST_SHARED_MEMORY:
        remedy = "in a container: docker run --shm-size=8g, or data.workers: 0"
        text = f"{size / GB:.2f} GB: too little for several data workers"
        yield Finding("machine", "shared memory", "warning", text, remedy)
    yield disk("runs", folder, "run_dir")
    try:
        yield disk("cache", cache_root(None, folder), "the environment variable PTFT_CACHE")
    except RecipeError as error:
        yield Finding("disk", "cache", "error", str(error))
    hub = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    yield disk("Hub downloads", hub, "the environment variable HF_HOME")
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        yield Finding(
            "disk", "Hub", "absent", "HF_HUB_OFFLINE is set: models and data sets must be there (ptft prefetch)"
        )


def disk(name: str, folder: Path, key: str) -> Finding:
    """Whether a folder, or the nearest one above it, can be written and has room. key: what sets another one."""
    known = (folder.absolute(), *folder.absolute().parents)
    place = next(each for each in known if os.path.isdir(each))  # noqa: PTH112  # Path.is_dir raises PermissionError
    free = shutil.disk_usage(place).free
    text = f"{folder}: {free / GB:.1f} GB free on {kind_of(place)}"
    if not os.access(place, os.W_OK | os.X_OK):
        return Finding("disk", name, "error", f"{folder}: cannot be written", f"choose another with {key}")
    if free < LEAST_DISK:
        return Finding("disk", name, "warning", text, f"make room, or choose another disk with {key}")
    return Finding("disk", name, "ok", text)


def kind_of(folder: Path) -> str:
    """The file system of a folder."""
    mounts = {each.mountpoint: each.fstype for each in psutil.disk_partitions(all=True)}
    here = next((str(each) for each in (folder, *folder.parents) if str(each) in mounts), "")
    kind = mounts.get(here, "an unknown file system")
    return f"{kind}, over the network" if kind in REMOTE else kind


def network(lookups: Lookups | None = None) -> Iterator[Finding]:
    """Whether other machines can reach this one by its name."""
    lookups = lookups or Lookups()
    host = lookups.host()
    addresses = lookups.resolve(host)
    if not addresses:
        remedy = "add the name to /etc/hosts; runs on this machine alone work without"
        yield Finding("network", "host name", "warning", f"{host} has no address", remedy)
    elif all(each.startswith("127.") or each == "::1" for each in addresses):
        text = f"{host} is {addresses[0]}, where other machines cannot reach it; runs on several choose the interface"
        yield Finding("network", "host name", "ok", text)
    else:
        yield Finding("network", "host name", "ok", f"{host} is {addresses[0]}")


def slurm() -> Iterator[Finding]:
    """Slurm's version and partitions, or that there is none."""
    if shutil.which("sbatch") is None:
        yield Finding("Slurm", "sbatch", "absent", "no Slurm on this machine")
        return
    try:
        version, found = ask("sbatch", "--version"), partitions()
    except SlurmError as error:
        first, remedy = str(error).splitlines()[0], "ptft submit cannot work until this is repaired"
        yield Finding("Slurm", "sbatch", "warning", first, remedy)
        return
    names = ", ".join(f"{each.name} ({each.nodes} nodes, {each.gpus} GPUs each)" for each in found.values())
    yield Finding("Slurm", "sbatch", "ok", f"{version}; partitions: {names or 'none'}")
