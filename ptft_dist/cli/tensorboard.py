"""`ptft tensorboard`: start TensorBoard."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

EVENTS = "events.out.tfevents.*"
REFRESH_S = 30.0
"""How often TensorBoard is shown runs that have begun since."""


def tensorboard(
    run: Annotated[Path, typer.Argument(help="A run directory, or a folder of several.")],
    port: Annotated[int, typer.Option(help="The port of the page.")] = 6006,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "localhost",
) -> None:
    """Start TensorBoard on one run or several."""
    from ptft_dist.errors import RecipeError

    if not any(run.rglob(EVENTS)):
        raise RecipeError(f"{run}: no TensorBoard events in this directory or below; give a run directory")
    words = [sys.executable, "-m", "tensorboard.main", "--port", str(port), "--host", host, "--logdir"]
    if not event_folders(run):  # events that are not in the tensorboard folder of a run
        os.execv(sys.executable, [*words, str(run)])
    with tempfile.TemporaryDirectory(prefix="ptft-tensorboard-") as folder:
        link_runs(run, Path(folder))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the child, see below
        process = subprocess.Popen([*words, folder])
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    raise typer.Exit(process.wait(REFRESH_S))
                link_runs(run, Path(folder))
        except KeyboardInterrupt:
            raise typer.Exit(128 + signal.SIGINT) from None
        finally:
            process.terminate()
            process.wait()


def event_folders(folder: Path) -> dict[str, Path]:
    """The tensorboard folder of each run in a folder by the name to show: its run directory, from that folder on."""
    found = {}
    for events in sorted({file.parent for file in folder.rglob(f"tensorboard/{EVENTS}")}):
        run = events.parent
        found["/".join(run.relative_to(folder).parts) or folder.resolve().name] = events.resolve()
    return found


def link_runs(folder: Path, links: Path) -> None:
    """Link each run's events under its name, since TensorBoard names runs by their path below the log directory.

    A run within another one is linked beside it, as `outer, inner`, because it cannot lie within a link.
    """
    names = event_folders(folder)
    for name, events in names.items():
        outer = next((other for other in names if name.startswith(f"{other}/")), None)
        link = links / (name if outer is None else f"{outer}, {name[len(outer) + 1 :]}")
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link)  # links of runs within this one, which has begun later; now they lie beside it
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(events, target_is_directory=True)
