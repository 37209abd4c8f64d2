"""Lists the checkpoints of a run: step, backend, size, the best one, and damage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptft_dist.checkpoint.checkpoint import Checkpoint, Checkpoints, read_checkpoint, verify
from ptft_dist.errors import CheckpointError


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint of a run."""

    path: Path
    backend: str | None
    """single, ddp, fsdp2, zero1, zero2 or zero3; None if the manifest cannot be read."""
    world_size: int | None
    size_bytes: int | None
    is_best: bool
    """It contains the weights of the best evaluation."""
    problems: Sequence[str]
    """Descriptions of damage; empty for an undamaged checkpoint."""


def list_checkpoints(run_dir: Path) -> list[CheckpointInfo]:
    """The checkpoints of a run, sorted by step. Every byte is verified.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    checkpoints = Checkpoints(run_dir / "checkpoints")
    paths = checkpoints.paths()
    if not paths:
        raise CheckpointError(
            f"{checkpoints.folder} contains no checkpoint. Give the run_dir of a run that has saved one."
        )
    read = [_read(path) for path in paths]
    readable = [checkpoint for checkpoint in read if isinstance(checkpoint, Checkpoint)]
    best_step = _best_step(readable[-1].manifest) if readable else None
    return [_info(path, checkpoint, best_step) for path, checkpoint in zip(paths, read, strict=True)]


def _read(path: Path) -> Checkpoint | CheckpointError:
    try:
        return read_checkpoint(path)
    except CheckpointError as error:
        return error


def _best_step(newest: Mapping[str, Any]) -> int | None:
    """The step of the best checkpoint, from the manifest of the newest one. Versions up to 0.1 wrote `best_step`."""
    progress = newest.get("progress") or {}
    best = progress.get("best_checkpoint")
    return progress.get("best_step") if best is None else best["step"]


def _info(path: Path, checkpoint: Checkpoint | CheckpointError, best_step: int | None) -> CheckpointInfo:
    if isinstance(checkpoint, CheckpointError):
        return CheckpointInfo(path, None, None, None, is_best=False, problems=[str(checkpoint)])
    manifest = checkpoint.manifest
    return CheckpointInfo(
        path,
        backend=manifest["kind"],
        world_size=manifest["world_size"],
        size_bytes=sum(file["bytes"] for file in manifest["files"].values()),
        is_best=checkpoint.step == best_step,
        problems=verify(checkpoint),
    )
