"""`ptft tensorboard`: start TensorBoard."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def tensorboard(
    run: Annotated[Path, typer.Argument(help="A run directory, or a folder of several.")],
    port: Annotated[int, typer.Option(help="The port of the page.")] = 6006,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "localhost",
) -> None:
    """Start TensorBoard on one run or several."""
    from ptft_dist.errors import RecipeError

    if not any(run.rglob("events.out.tfevents.*")):
        raise RecipeError(f"{run}: no TensorBoard events in this directory or below; give a run directory")
    words = ["--logdir", str(run), "--port", str(port), "--host", host]
    os.execv(sys.executable, [sys.executable, "-m", "tensorboard.main", *words])
