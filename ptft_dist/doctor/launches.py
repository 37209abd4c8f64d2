"""Which shipped launch configs this machine can run."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ptft_dist.config.shipped import shipped
from ptft_dist.doctor.finding import Finding
from ptft_dist.launch.launch_file import LaunchFile, read_launch_file


def launches(gpus: int, missing: Collection[str]) -> Iterator[Finding]:
    """Each launch config of this package.

    Args:
        gpus: the GPUs of this machine.
        missing: DeepSpeed's operations that cannot be compiled.
    """
    for path in sorted(shipped("launch_configs").glob("*.yaml")):
        file = read_launch_file(path.stem)
        reason = why_not(file, path.stem, gpus, missing)
        if reason:
            yield Finding("launch configs", path.stem, "absent", reason)
        else:
            yield Finding("launch configs", path.stem, "ok", how(file, path.stem, gpus))


def why_not(file: LaunchFile, name: str, gpus: int, missing: Collection[str]) -> str:
    """Why this machine cannot run it; empty if it can."""
    if not gpus and not name.startswith("cpu"):
        return "for GPUs"
    fields = file.settings.deepspeed or {}
    if fields.get("offload_optimizer_device") == "cpu" and "CPUAdamBuilder" in missing:
        return "needs DeepSpeed's CPUAdam, which cannot be compiled here"
    return ""


def how(file: LaunchFile, name: str, gpus: int) -> str:
    """The options with which to start it here."""
    if file.machines > 1:
        return f"--launch {name} --machines N --machine-rank R --address HOST:PORT, on each machine"
    if file.distributed_type == "NO":
        return f"--launch {name}, one process"
    return f"--launch {name} --processes {gpus if gpus and not name.startswith('cpu') else 'N'}"
