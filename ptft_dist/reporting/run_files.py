"""Files of a run: recipe, environment, data report, tokenizer, result; and reports of failures."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from ptft_dist import __version__
from ptft_dist.config.load import Loaded
from ptft_dist.config.recipe import TokenizerSection
from ptft_dist.config.secrets import hide
from ptft_dist.errors import (
    EXIT_LOST,
    REMEDIES,
    Failure,
    MachineLostError,
    PtftError,
    RecipeError,
    StillRunningError,
    is_hardware_fault,
    is_killed_worker,
)
from ptft_dist.launch.environment import Place, job_id, restarted_job, start_token, tell_launcher
from ptft_dist.launch.result import ENVIRONMENT, RESULT, may_be_of_this_start, read_json, write_failure
from ptft_dist.reporting.messages import fail, say

TOKENIZER, _LEARNED_BY = "tokenizer", ".tokenizer.json"
_DAY_S = 86_400.0
_RANKS_BEGIN_WITHIN_S = 60.0
"""The ranks of a start begin within this time. What failed earlier belongs to an earlier start."""
LOCK_WAIT_S = 300.0
"""Slurm marks a host as down after 300 s by default, and then kills what ran there."""
PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "tokenizers", "datasets", "peft", "trl")


def make_run_dir(run_dir: Path) -> None:
    """Create the directory. Raises RecipeError if it cannot be written."""
    try:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".writable-{socket.gethostname()}-{os.getpid()}"
        try:
            probe.write_bytes(bytes(4096))
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise RecipeError(
            f"run_dir: {run_dir} cannot be written: {error.strerror}. Make room, or choose another run_dir"
        ) from None


@dataclass(frozen=True)
class RunDirLock:
    """The lock of a run directory, and the file that says who has it."""

    lock: FileLock
    holder: Path

    def release(self) -> None:
        self.holder.unlink(missing_ok=True)
        self.lock.release()


def lock_run_dir(run_dir: Path) -> RunDirLock:
    """Lock the directory against a second start. The lock ends with the process.

    A requeued job waits a while: on a host that was cut off, the process of its earlier start may still end.

    Raises:
        RecipeError: another process has the lock.
        StillRunningError: the same in a requeued job.
    """
    lock, holder = FileLock(run_dir / ".lock"), run_dir / ".lock-holder"
    job, requeued = job_id(), restarted_job() is not None
    try:
        lock.acquire(timeout=0)
    except Timeout:
        other = holder.read_text() if holder.exists() else "unknown"
        text = f"run_dir: another process is training in {run_dir} ({other})"
        if not requeued:
            raise RecipeError(f"{text}; wait for it or choose another") from None
        say(f"{text}; waiting for it for {LOCK_WAIT_S:.0f} s")
        try:
            lock.acquire(timeout=LOCK_WAIT_S, poll_interval=1)
        except Timeout:
            raise StillRunningError(f"{text}. It has not ended within {LOCK_WAIT_S:.0f} s; end it") from None
    holder.write_text(f"process {os.getpid()} on {socket.gethostname()}" + (f", {job}" if job else ""))
    return RunDirLock(lock, holder)


def write_start(run_dir: Path, loaded: Loaded, data_report: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
    """Write recipe.yaml as given, resolved.yaml with every value, data_report.json, and environment.json with versions
    and host. Remove the result of an earlier start."""
    (run_dir / "recipe.yaml").write_text(loaded.text, encoding="utf-8")
    (run_dir / "resolved.yaml").write_text(loaded.resolved, encoding="utf-8")
    (run_dir / "data_report.json").write_text(hide(json.dumps(data_report, indent=1)), encoding="utf-8")
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": sys.argv,
        "ptft_dist": __version__,
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "start": start_token(os.environ),
        **machine,
    }
    (run_dir / RESULT).unlink(missing_ok=True)
    (run_dir / ENVIRONMENT).write_text(json.dumps(environment, indent=1))


def keep_tokenizer(tokenizer: Path, settings: Mapping[str, Any], run_dir: Path) -> None:
    """Copy the tokenizer that was trained for this run to run_dir/tokenizer, so that a resume with another cache uses
    it too. settings: the settings it was trained with."""
    target, partial = run_dir / TOKENIZER, run_dir / ".tokenizer.partial"
    if tokenizer.resolve() == target.resolve():
        return
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(tokenizer, partial)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    (run_dir / _LEARNED_BY).write_text(json.dumps(settings))


def save_tokenizer(tokenizer: Any, run_dir: Path, origin: Path) -> None:
    """Write a tokenizer that was not trained for this run to run_dir/tokenizer, for later exports of checkpoints.

    origin: a file to copy too, if it exists.
    """
    target, partial = run_dir / TOKENIZER, run_dir / ".tokenizer.partial"
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    if origin.is_file():
        shutil.copy(origin, partial)
    (run_dir / _LEARNED_BY).unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def kept_tokenizer(settings: Mapping[str, Any], run_dir: Path) -> Path | None:
    """The tokenizer that `keep_tokenizer` copied, if it was trained with these settings; otherwise None."""
    try:
        saved = json.loads((run_dir / _LEARNED_BY).read_text())
        # An earlier version had fewer keys; what they do now by default is what it did.
        saved["tokenizer"] = TokenizerSection.model_validate(saved["tokenizer"]).model_dump(mode="json")
        same = saved == settings
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return run_dir / TOKENIZER if same and (run_dir / TOKENIZER).is_dir() else None


class FailureReport:
    """Reports the first failure among the ranks of this machine once, and its exit code to the launcher.

    Before the run begins, nothing in the run directory changes: a refused command must not overwrite the result of an
    earlier run. Afterwards each rank's traceback goes to its log, and the first failure to result.json.
    """

    def __init__(self, run_dir: Path, place: Place) -> None:
        self.run_dir, self.place, self.begun = run_dir, place, False
        self.log = run_dir / "logs" / f"rank-{place.rank}.log"
        self.claim = _scratch() / f"failed-{_this_start()}"
        self._at_begin: str | None = None

    def begin(self) -> None:
        """The run begins. Rank 0 has named this start in environment.json; others may still see the one before."""
        self.begun, self._at_begin = True, read_json(self.run_dir / ENVIRONMENT).get("start")

    def write(
        self,
        error: Exception,
        exit_code: int,
        wall_s: float,
        cause: Failure | None = None,
        lost_hosts: Sequence[str] = (),
    ) -> None:
        """Report an error of this rank.

        Args:
            cause: the failure of another rank that this one follows from, if one was announced.
            lost_hosts: the machines that were lost, as far as this rank knows.
        """
        trace = hide("".join(traceback.format_exception(error)))
        if self.begun:
            with _reporting(self.log), self.log.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self.place.rank} failed\n{trace}\n")
        what = self._what(error, exit_code, cause, lost_hosts)
        if self._is_first():
            if not isinstance(error, PtftError):
                fail(trace)
            where = f"\nlog: {self.log}" if self.begun and not isinstance(error, PtftError) else ""
            fail(f"error: {what}{where}")
            with _reporting(self.claim):
                tell_launcher(exit_code)
        elif not lost_hosts:
            return  # another rank of this machine failed first; this failure probably follows from it
        if self.begun and not self._is_replaced():
            host = cause.host if cause is not None and cause.host else socket.gethostname()
            result = {"exit_code": exit_code, "wall_s": round(wall_s, 2), "error": what, "host": host}
            with _reporting(self.run_dir / RESULT):
                write_failure(self.run_dir, result, lost_hosts)

    def _is_replaced(self) -> bool:
        """Whether a later start has begun: this machine was cut off, and the job was requeued without it."""
        now = read_json(self.run_dir / ENVIRONMENT)
        return not may_be_of_this_start(now) and now.get("start") not in (None, self._at_begin)

    def _is_first(self) -> bool:
        """Whether no other rank of this machine has failed before in this start."""
        with _reporting(self.claim):
            _remove_old_claims(self.claim.parent)
            with contextlib.suppress(FileNotFoundError):
                if self.claim.stat().st_mtime < psutil.Process().create_time() - _RANKS_BEGIN_WITHIN_S:
                    self.claim.unlink(missing_ok=True)
            try:
                self.claim.touch(exist_ok=self.place.world_size == 1)
            except FileExistsError:
                return False
        return True

    def _what(self, error: Exception, exit_code: int, cause: Failure | None, lost_hosts: Sequence[str]) -> str:
        """The error in words, with what it follows from or what to do."""
        what = hide(str(error) if isinstance(error, PtftError) else f"{type(error).__name__}: {error}")
        if self.place.world_size > 1 and not isinstance(error, MachineLostError):
            what = f"rank {self.place.rank} failed first: {what}"
        if cause is not None and (not isinstance(error, PtftError) or isinstance(error, MachineLostError)):
            return f"{what}\nThis follows from an earlier failure: {hide(cause.said)}"
        if isinstance(error, PtftError):
            return what
        if is_hardware_fault(error):
            return f"{what}\nA GPU of {socket.gethostname()} or its connection is faulty."
        if is_killed_worker(error):
            return f"{what}\nPerhaps the machine ran out of memory: lower data.workers, or ask for more memory."
        if exit_code == EXIT_LOST and lost_hosts:
            return f"{what}\nLost: {', '.join(lost_hosts)}."
        if exit_code == EXIT_LOST:
            return f"{what}\nAnother rank was killed (out of memory?); the launcher's summary names it."
        return f"{what}\n{REMEDIES[exit_code]}." if exit_code in REMEDIES else what


def _scratch() -> Path:
    """A directory of this user that all ranks of this machine share."""
    folder = Path(tempfile.gettempdir()) / f"ptft-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _remove_old_claims(folder: Path) -> None:
    """Remove the claims of starts that failed more than a day ago."""
    for old in folder.glob("failed-*"):
        with contextlib.suppress(FileNotFoundError):  # removed by another process
            if time.time() - old.stat().st_mtime > _DAY_S:
                old.unlink()


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Report an OSError instead of raising it: a full disk must not hide the failure that is being reported."""
    try:
        yield
    except OSError as error:
        say(f"{path} cannot be written: {error.strerror}")


def _this_start() -> str:
    """A name that is common to the ranks of this start on this machine.

    It contains the start time of their parent, the launcher, because process ids are reused, and torchrun's number of
    restarts. If the parent is a shell, a later start with the same port has the same name; see `_is_first`.
    """
    launcher = os.getppid()
    began = 0.0
    with contextlib.suppress(psutil.Error):  # the parent is process 0 if this is the first process of a container
        began = psutil.Process(launcher).create_time()
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"{launcher}-{began:.2f}-{os.environ.get('MASTER_PORT', '')}-{again}"
