"""Checkpoints on disk: files, a manifest with their hashes that is written last, atomic commit, retention.

A checkpoint is a directory `step-00000100` with a manifest. It is written under a hidden name and renamed when it is
complete. So a directory with that name is complete unless it was damaged later, which the hashes detect.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from ptft_dist.errors import CheckpointError, CheckpointVersionError, ShardWriteError

MANIFEST = "manifest.json"
FORMAT = 1
T = TypeVar("T")
_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL, _TRASH = ".partial-", ".trash-"
Files = dict[str, dict[str, Any]]  # name -> {"bytes": size, "sha256": hex digest}


class Ranks(Protocol):
    """The processes that write a checkpoint together: the engine, or `OneProcess`."""

    rank: int
    world_size: int

    def gather_objects(self, value: Any) -> list[Any]: ...


class OneProcess:
    """`Ranks` for a single process without an engine."""

    rank, world_size = 0, 1

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]


class SaveError(CheckpointError):
    """A checkpoint could not be written; existing ones are unchanged."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose manifest has been read."""

    path: Path
    step: int
    manifest: dict[str, Any]

    def entry(self, key: str, kind: type[T]) -> T:
        """The manifest's value of `key`. Raises CheckpointVersionError if it is missing or of another type."""
        value = self.manifest.get(key)
        if not isinstance(value, kind):
            raise CheckpointVersionError(
                f"{self.path / MANIFEST} was written by another version of ptft: this version needs {key!r}, a "
                f"{kind.__name__}; resume with the version that wrote it"
            )
        return value


def read_checkpoint(path: Path) -> Checkpoint:
    """Read the manifest of the checkpoint at `path`.

    Raises:
        CheckpointVersionError: it was written by another version of ptft, in a format that this version cannot read.
        CheckpointError: its manifest is missing, unreadable or altered.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        _check_version(path, manifest)
        claimed = manifest.pop("sha256")
    except FileNotFoundError:
        inside = [each.parent for each in sorted(path.glob(f"checkpoints/step-*/{MANIFEST}"))]
        if inside:
            raise CheckpointError(f"{path} is a run, not a checkpoint; its newest one is {inside[-1]}") from None
        what = f"has no {MANIFEST}: it is not a checkpoint, or was damaged" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error}): the checkpoint is damaged") from None
    if claimed != _manifest_hash(manifest):
        raise CheckpointError(f"{path / MANIFEST} was altered: its own hash does not match")
    if not isinstance(manifest.get("step"), int) or not isinstance(manifest.get("files"), dict):
        raise CheckpointVersionError(
            f"{path / MANIFEST} was written by another version of ptft; resume with the version that wrote it"
        )
    return Checkpoint(path, manifest["step"], manifest)


def _check_version(path: Path, manifest: dict[str, Any]) -> None:
    """Check the format before the manifest's hash, because another version may compute the hash differently."""
    if "sha256" in manifest and manifest.get("format") != FORMAT:
        raise CheckpointVersionError(
            f"{path} has format {manifest.get('format')}; this version reads format {FORMAT}: resume with the version "
            "of ptft that wrote it"
        )


def verify(checkpoint: Checkpoint, ranks: Ranks | None = None) -> list[str]:
    """The problems with the files of a checkpoint; empty if there are none. The same on every rank; each file is
    hashed by one rank."""
    ranks = ranks or OneProcess()
    problems = []
    for name, expected in sorted(checkpoint.manifest["files"].items())[ranks.rank :: ranks.world_size]:
        path = checkpoint.path / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes instead of {expected['bytes']}")
        elif _file_hash(path) != expected["sha256"]:
            problems.append(f"{path} was altered: its SHA-256 does not match the manifest")
    return sorted(problem for part in ranks.gather_objects(problems) for problem in part)


def record(checkpoint: Checkpoint, **entries: Any) -> None:
    """Replace `entries` in the manifest of a checkpoint, atomically. Called on one rank.

    For values that are known only after the commit, such as the evaluation of its update. The checkpoint's files do
    not change.

    Raises:
        OSError: writing failed; the checkpoint is unchanged.
    """
    replacement = checkpoint.path / f"{MANIFEST}.new"
    try:
        _write_manifest(replacement, checkpoint.manifest | entries)
        replacement.replace(checkpoint.path / MANIFEST)
    finally:
        with contextlib.suppress(OSError):
            replacement.unlink(missing_ok=True)
    _fsync(checkpoint.path)


class Checkpoints:
    """The checkpoints of one run, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def paths(self) -> list[Path]:
        """Directories with a checkpoint's name, damaged ones included, sorted by step."""
        paths = [p for p in self.folder.glob("step-*") if _NAME.fullmatch(p.name)] if self.folder.is_dir() else []
        return sorted(paths, key=lambda p: int(p.name[5:]))

    def newest_good(self, ranks: Ranks, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest undamaged checkpoint, every byte verified; None if there is no checkpoint.

        Args:
            warn: called with a message for each damaged checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but all are damaged. The user has to choose to start from zero.
            CheckpointVersionError: a checkpoint was written in a format that this version cannot read.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                checkpoint = read_checkpoint(path)
                problems = verify(checkpoint, ranks)
            except CheckpointVersionError:
                raise
            except CheckpointError as error:
                problems = [str(error)]
            if not problems:
                return checkpoint
            warn("DAMAGED CHECKPOINT, not used: " + "; ".join(problems))
        if paths:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged (see above): restore one, or start over with "
                "--resume never"
            )
        return None

    def commit(
        self,
        step: int,
        write: Callable[[Path], Files | None],
        entries: dict[str, Any],
        ranks: Ranks,
        need_bytes: int = 0,
    ) -> Checkpoint:
        """Write a checkpoint on all ranks.

        Args:
            write: called as write(folder) on each rank. Writes files, and returns size and hash of those that it has
                already hashed and flushed to the disk. All other files are read and hashed here.
            entries: entries of the manifest.
            need_bytes: approximate size of the checkpoint. It is not begun with less free space, because a rank that
                fails during a sharded write leaves the others waiting.

        Raises:
            SaveError: any rank failed; raised on every rank. Nothing is left behind.
        """
        final = self.path_of(step)
        partial = self.folder / f"{_PARTIAL}{final.name}"
        main = ranks.rank == 0

        def start() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free
            if free < need_bytes:
                raise OSError(errno.ENOSPC, f"about {need_bytes:,} bytes are needed, {free:,} are free", self.folder)
            partial.mkdir()

        def seal() -> Files:
            """Hash this rank's part of the files that are not hashed yet."""
            remaining = [name for name in _files(partial) if name not in hashed]
            return {name: _seal(partial / name) for name in remaining[ranks.rank :: ranks.world_size]}

        def finish() -> None:
            _write_manifest(partial / MANIFEST, {"format": FORMAT, "step": step, **entries, "files": files})
            for folder in {partial, *(p for p in partial.rglob("*") if p.is_dir())}:
                _fsync(folder)
            partial.rename(final)
            _fsync(self.folder)

        try:
            _together(ranks, start if main else None)
            hashed = _merged(_together(ranks, lambda: write(partial)))
            files = hashed | _merged(_together(ranks, seal))
            _together(ranks, finish if main else None)
        except SaveError:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return read_checkpoint(final)

    def own(self, checkpoint: Checkpoint) -> bool:
        """Whether this run can resume from the checkpoint without being told: no other run's, and not set aside."""
        path = checkpoint.path.resolve()
        return path.parent == self.folder.resolve() and _NAME.fullmatch(path.name) is not None

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of update `step` is, or would be."""
        return self.folder / f"step-{step:08d}"

    def set_aside_after(self, step: int, log: Callable[[str], None]) -> None:
        """Rename all checkpoints after `step`, because a later resume would choose them as the newest.

        These are damaged ones, and those after an older checkpoint that a resume has chosen. None is deleted.
        """
        for path in self.paths():
            if int(path.name[5:]) > step:
                # Nanoseconds, because two starts may occur within one second.
                aside = path.with_name(f"aside-{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9}-{path.name}")
                path.rename(aside)
                log(f"{path.name} is no longer part of this run: renamed to {aside.name}")

    def retain(self, keep: int | None, best_step: int | None, log: Callable[[str], None]) -> None:
        """Delete all checkpoints except the newest `keep` (None: all) and the best. Called after a commit."""
        if keep is None:
            return
        for path in self.paths()[:-keep]:
            if int(path.name[5:]) != best_step:
                _discard(path, log)

    def clean(self, log: Callable[[str], None]) -> None:
        """Remove the remains of interrupted saves and deletions."""
        for path in self.folder.glob(".*") if self.folder.is_dir() else ():
            if path.name.startswith((_PARTIAL, _TRASH)) and _delete(path, log) and path.name.startswith(_PARTIAL):
                log(f"removed the incomplete checkpoint {path.name.removeprefix(_PARTIAL)}")


def _together(ranks: Ranks, action: Callable[[], Any] | None) -> list[Any]:
    """Run `action` on each rank that has one; return the results of all ranks.

    An exception must reach the other ranks, because they would wait for this rank forever. ShardWriteError is raised on
    this rank only: the others wait inside the action and cannot be reached.

    Raises:
        SaveError: a rank failed; raised on all ranks.
    """
    result, failure = None, None
    try:
        result = action() if action is not None else None
    except ShardWriteError:
        raise
    except Exception as error:
        failure = f"rank {ranks.rank}: {type(error).__name__}: {error}"
    outcomes = ranks.gather_objects((result, failure))
    failures = [failure for _, failure in outcomes if failure is not None]
    if failures:
        raise SaveError("the checkpoint was not written; earlier ones are untouched: " + "; ".join(failures))
    return [result for result, _ in outcomes]


def _merged(parts: list[Files | None]) -> Files:
    return {name: file for part in parts for name, file in (part or {}).items()}


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _seal(path: Path) -> dict[str, Any]:
    """Flush a file to the disk; return its size and hash."""
    _fsync(path)
    return {"bytes": path.stat().st_size, "sha256": _file_hash(path)}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with its own hash, flushed to the disk."""
    sealed = manifest | {"sha256": _manifest_hash(manifest)}
    with path.open("w") as file:
        file.write(json.dumps(sealed, indent=1, sort_keys=True))
        file.flush()
        os.fsync(file.fileno())


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path, log: Callable[[str], None]) -> None:
    """Delete a directory after renaming it, so that it is never visible half-deleted under its own name."""
    trash = path.with_name(f"{_TRASH}{path.name}-{time.time_ns()}")
    try:
        path.rename(trash)
    except OSError as error:
        log(f"{path.name} was not deleted: {error}. A later save tries again")
    else:
        _delete(trash, log)


def _delete(path: Path, log: Callable[[str], None]) -> bool:
    """Delete a directory; an error, as on NFS while another process reads a file of it, does not end the run."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        log(f"{path.name} was not deleted: {error}. The next start tries again")
        return False
    return True
