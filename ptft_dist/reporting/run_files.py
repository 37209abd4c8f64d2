"""The files of a run beside its checkpoints and metrics: recipe, environment, result, and what is told of a failure."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from ptft_dist import __version__
from ptft_dist.config.load import Loaded, dump_resolved
from ptft_dist.config.secrets import hide
from ptft_dist.errors import PtftError, RecipeError
from ptft_dist.launch.environment import Place
from ptft_dist.reporting.metrics import say

PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "tokenizers", "datasets", "peft", "trl")


def make_run_dir(run_dir: Path) -> None:
    """Create the directory. Raises RecipeError if it cannot be written."""
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{socket.gethostname()}-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise RecipeError(f"run_dir: {run_dir} cannot be written: {error.strerror}") from None


def lock_run_dir(run_dir: Path) -> FileLock:
    """Hold the directory against a second start. The lock goes with the process, however it ends."""
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RecipeError(f"run_dir: another process is training in {run_dir}; wait for it or choose another") from None
    return lock


def write_start(run_dir: Path, loaded: Loaded, facts: dict[str, Any]) -> None:
    """recipe.yaml as it was given, resolved.yaml with every value, environment.json with versions and machine."""
    (run_dir / "recipe.yaml").write_text(loaded.text, encoding="utf-8")
    (run_dir / "resolved.yaml").write_text(dump_resolved(loaded), encoding="utf-8")
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": sys.argv,
        "ptft_dist": __version__,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        **facts,
    }
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=1))
    (run_dir / "result.json").unlink(missing_ok=True)


def write_result(run_dir: Path, result: dict[str, Any]) -> None:
    """result.json, replaced whole."""
    partial = run_dir / f".result-{os.getpid()}.json"
    try:
        partial.write_text(json.dumps(result, indent=1))
        partial.replace(run_dir / "result.json")
    finally:
        partial.unlink(missing_ok=True)


class FailureReport:
    """Tells of the first failure on this machine's ranks, once; every rank's own goes to its log."""

    def __init__(self, run_dir: Path, where: Place) -> None:
        self.run_dir, self.where = run_dir, where
        self.log = run_dir / "logs" / f"rank-{where.rank}.log"
        host = socket.gethostname()
        self.claim = run_dir / "logs" / f".failed-{host}-{_this_start()}"
        for old in self.claim.parent.glob(f".failed-{host}-*"):
            if old != self.claim:  # this one may be there: a faster rank has failed before this one began
                old.unlink(missing_ok=True)

    def write(self, error: Exception, exit_code: int, wall_s: float) -> None:
        trace = hide(traceback.format_exc())
        with _told(self.log), self.log.open("a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.where.rank} failed\n{trace}\n")
        with _told(self.claim):
            try:
                self.claim.touch(exist_ok=self.where.world_size == 1)
            except FileExistsError:
                return  # another rank failed first; this failure most likely follows from that one
        who = f"rank {self.where.rank} failed first: " if self.where.world_size > 1 else ""
        what = hide(str(error) if isinstance(error, PtftError) else f"{type(error).__name__}: {error}")
        if "closed by peer" in what or "reset by peer" in what:
            what += "\nAnother rank is gone, killed from outside (out of memory?): the launcher's summary names it."
        if not isinstance(error, PtftError):
            say(trace)
        say(f"error: {who}{what}" + ("" if isinstance(error, PtftError) else f"\nlog: {self.log}"))
        result = {"status": "failed", "exit_code": exit_code, "wall_s": round(wall_s, 2), "error": f"{who}{what}"}
        with _told(self.run_dir / "result.json"):
            write_result(self.run_dir, result)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """A file that cannot be written, on a full disk say, must not hide the failure that is being told."""
    try:
        yield
    except OSError as error:
        say(f"{path} cannot be written: {error.strerror}")


def _this_start() -> str:
    """A name that all ranks of this start on this machine share, and no other start: their launcher is their parent.

    Its number alone would come back, in a container at every start.
    """
    launcher = os.getppid()
    began = 0.0
    with contextlib.suppress(psutil.Error):  # process 0 is the parent where this one is the first in its container
        began = psutil.Process(launcher).create_time()
    return f"{launcher}-{began:.2f}-{os.environ.get('MASTER_PORT', '')}"
