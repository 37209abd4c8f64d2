"""`ptft checkpoints`: what a run can go on from, every byte checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def checkpoints(run: Annotated[Path, typer.Argument(help="A run directory.")]) -> None:
    """List and verify the checkpoints of a run; exit code 4 if one is damaged."""
    from ptft_dist.checkpoint.checkpoint import Checkpoints, read_checkpoint, verify
    from ptft_dist.errors import CheckpointError

    paths = Checkpoints(run / "checkpoints").paths()
    if not paths:
        raise CheckpointError(f"{run / 'checkpoints'} holds no checkpoint")
    damaged, best_step = 0, None
    for path in reversed(paths):  # the newest knows which is the best
        try:
            best_step = read_checkpoint(path).fact("progress", dict).get("best_step")
        except CheckpointError:
            continue
        break
    for path in paths:
        try:
            checkpoint = read_checkpoint(path)
            problems = verify(checkpoint)
        except CheckpointError as error:
            problems = [str(error)]
        else:
            manifest = checkpoint.manifest
            size = sum(file["bytes"] for file in manifest["files"].values())
            best = "  best" if best_step == checkpoint.step else ""
            facts = f"{manifest['kind']} x {manifest['world_size']}  {size / 1e6:,.1f} MB"
            print(f"{path.name}  {facts}{best}  {'DAMAGED' if problems else 'good'}")
        for problem in problems:
            print(f"  {problem}")
        damaged += bool(problems)
    if damaged:
        raise CheckpointError(f"{damaged} of {len(paths)} checkpoints are damaged")
