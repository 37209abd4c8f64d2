"""`ptft checkpoints`: list the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ptft_dist.checkpoint.listing import CheckpointInfo


def checkpoints(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """List the checkpoints of a run and verify their hashes. Exit code 4 if one is damaged."""
    from ptft_dist import api
    from ptft_dist.errors import CheckpointError

    listed = api.checkpoints(run)
    for checkpoint in listed:
        if checkpoint.size_bytes is not None:
            print(_line(checkpoint))
        for problem in checkpoint.problems:
            print(f"  {problem}")
    damaged = sum(bool(checkpoint.problems) for checkpoint in listed)
    if damaged:
        raise CheckpointError(f"{damaged} of {len(listed)} checkpoints are damaged")


def _line(checkpoint: CheckpointInfo) -> str:
    size = f"{(checkpoint.size_bytes or 0) / 1e6:,.1f} MB"
    state = "DAMAGED" if checkpoint.problems else "good"
    best = "  best" if checkpoint.is_best else ""
    return f"{checkpoint.path.name}  {checkpoint.backend} x {checkpoint.world_size}  {size}{best}  {state}"
