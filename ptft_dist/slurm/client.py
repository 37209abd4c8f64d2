"""Questions to Slurm, through its commands."""

from __future__ import annotations

import getpass
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ptft_dist.errors import PtftError

_TIMEOUT_S = 60.0
ENDED = (
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",
)
"""States of a job that has ended, and is not requeued."""


class SlurmError(PtftError):
    """One of Slurm's commands is missing, or has failed."""


def ask(*words: str) -> str:
    """The output of one of Slurm's commands. Raises SlurmError."""
    if shutil.which(words[0]) is None:
        raise SlurmError(f"{words[0]}: not found on this machine. Run this on a login node of the cluster")
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]}: no answer within {_TIMEOUT_S:.0f} s. Is slurmctld running?") from None
    if done.returncode:
        raise SlurmError(f"{' '.join(words[:3])}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip()


def fields(text: str) -> dict[str, str]:
    """The fields of a line of `scontrol --oneliner show`."""
    return dict(re.findall(r"(?:^| )([A-Za-z/:]+)=(.*?)(?= [A-Za-z/:]+=|$)", text))


@dataclass(frozen=True)
class Partition:
    """What a partition offers."""

    name: str
    is_default: bool
    limit_s: int | None
    """The longest time limit; None: no limit."""
    nodes: int
    cpus: int
    """The most CPUs of a node."""
    gpus: int
    """The most GPUs of a node."""


def partitions() -> dict[str, Partition]:
    """All partitions by name. Raises SlurmError."""
    sizes: dict[str, tuple[int, int]] = {}
    for line in ask("sinfo", "--noheader", "--Node", "--format=%R|%c|%G").splitlines():
        name, count, resources = line.split("|")
        gpus = sum(int(each) for each in re.findall(r"gpu(?::[^:,()]+)?:(\d+)", resources))
        before = sizes.get(name, (0, 0))
        sizes[name] = (max(before[0], int(count)), max(before[1], gpus))
    found = {}
    for line in ask("scontrol", "--oneliner", "show", "partition").splitlines():
        values = fields(line)
        name = values["PartitionName"]
        cpus, gpus = sizes.get(name, (0, 0))
        limit = seconds(values.get("MaxTime", "UNLIMITED"))
        is_default = values.get("Default") == "YES"
        found[name] = Partition(name, is_default, limit, int(values.get("TotalNodes", "0")), cpus, gpus)
    return found


def seconds(limit: str) -> int | None:
    """A time limit in Slurm's notation in seconds: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS.

    None for UNLIMITED.
    """
    if not limit[:1].isdigit():
        return None
    days, has_days, clock = limit.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if has_days:
        hours, minutes, rest = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, rest = parts
    else:
        hours, (minutes, rest) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def job_facts(job: str) -> Mapping[str, str] | None:
    """The fields of `scontrol show job`; None if Slurm has forgotten the job. Raises SlurmError."""
    try:
        return fields(ask("scontrol", "--oneliner", "show", "job", job))
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return None
        raise


def associations() -> dict[str, set[str]] | None:
    """The accounts of this user, and the qos that each may use; None where Slurm keeps no accounts."""
    try:
        words = ("sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={getpass.getuser()}")
        lines = ask(*words, "format=Account,QOS").splitlines()
    except (SlurmError, KeyError):
        return None
    found: dict[str, set[str]] = {}
    for line in lines:
        account, _, qos = line.partition("|")
        found.setdefault(account, set()).update(qos.split(",") if qos else ())
    return found or None


def sbatch(script: Path, log: Path, *, array: bool = False) -> str:
    """Submit a script; the job's id. log: the directory of its logs. Raises SlurmError."""
    name = "%A_%a.log" if array else "%j.log"
    return ask("sbatch", "--parsable", f"--output={str(log).replace('%', '%%')}/{name}", str(script)).split(";")[0]
