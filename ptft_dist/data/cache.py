"""Cache directories that are built once and shared by all runs, and remembered hashes of source files.

A directory is built under a temporary name and renamed when it is complete. So a process that is killed leaves no
directory that looks complete. A lock file lets one process build while the others wait.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ptft_dist.config.places import expanded
from ptft_dist.errors import DataError, PtftError, RecipeError
from ptft_dist.reporting.messages import Progress, progress, say

# Two writes within this time may have the same time stamp. So the hash of a file modified more recently is not kept.
SETTLED_AFTER_NS = 2_000_000_000
_HASHED_AT_ONCE = 1 << 24  # bytes
_RUST_IO_ERROR = re.compile(r"\(os error \d+\)")


class Busy(Exception):
    """Another process builds the directory."""


class NotWritten(PtftError):
    """The cache cannot be written."""


def cache_root(cache_dir: str | None, base: Path) -> Path:
    """The cache directory: `cache_dir` (relative to `base`), else PTFT_CACHE, else the user's cache directory.

    Raises:
        RecipeError: it cannot be created.
    """
    import platformdirs

    given = cache_dir or os.environ.get("PTFT_CACHE") or platformdirs.user_cache_dir("ptft")
    root = base / expanded(given) if cache_dir else expanded(given).absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(
            f"{root}: the cache directory cannot be created ({error.strerror}). Set data.cache_dir, or the environment "
            "variable PTFT_CACHE, to a writable directory."
        ) from error
    return root


def fingerprint(value: Any) -> str:
    """A hash of a JSON value: 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def build_each(directories: Sequence[Path], build: Callable[[int, Path], object]) -> None:
    """Build all directories that do not exist. Several processes, also on other machines, share the work.

    build: fills the empty directory of the index that it is given, see `build_once`.

    Raises:
        PtftError: the cache cannot be written.
    """
    busy = []
    for index, directory in enumerate(directories):
        try:
            build_once(directory, functools.partial(build, index), wait=False)
        except Busy:
            busy.append(index)
    for index in busy:
        build_once(directories[index], functools.partial(build, index))


def build_once(directory: Path, build: Callable[[Path], object], *, wait: bool = True) -> bool:
    """Build `directory` unless it exists; return whether it existed.

    Args:
        wait: wait while another process builds it. Otherwise raise Busy.
        build: fills an empty directory. It uses `writing` around its own writes. Its exceptions are passed on
            unchanged, because reading sources can also raise OSError. After an exception nothing is left behind.

    Raises:
        PtftError: the cache cannot be written.
    """
    if directory.exists():
        return True
    unfinished = directory.with_name(f"{directory.name}.building-{os.getpid()}@{platform.node()}")

    def on_wait() -> None:
        if not wait:
            raise Busy
        say(f"waiting for {_builder(directory)}, which prepares the same data")

    with _locked(_lock_path(directory), on_wait):
        if directory.exists():
            return True
        _remove_dead_builds(directory)
        try:
            with writing(directory):
                unfinished.mkdir()
            build(unfinished)
            with writing(directory):
                _flush(unfinished)
                unfinished.rename(directory)
                _fsync(directory.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return False


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert errors of writing to the cache; must not enclose code that reads sources.

    Raises:
        PtftError: instead of OSError, with the remedy.
    """
    try:
        yield
    except OSError as error:
        raise _not_written(path, error) from error
    except Exception as error:
        if type(error) is Exception and _RUST_IO_ERROR.search(str(error)):  # the tokenizer library's only error class
            raise _not_written(path, error) from error
        raise


def _not_written(path: Path, error: Exception) -> NotWritten:
    return NotWritten(
        f"{path}: the cache cannot be written ({error}). Free disk space or correct its permissions, or set "
        "data.cache_dir or PTFT_CACHE to another directory."
    )


def _lock_path(directory: Path) -> Path:
    return directory.with_name(f"{directory.name}.lock")


@contextmanager
def _locked(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    from filelock import FileLock, Timeout  # not needed by `ptft submit`, which must be fast

    lock = FileLock(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            on_wait()
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _builder(directory: Path) -> str:
    """A description of the process that builds the directory, from the name of its temporary directory."""
    names = [path.name for path in directory.parent.glob(f"{directory.name}.building-*")]
    if len(names) != 1:
        return "another process"
    pid, _, host = names[0].partition(".building-")[2].partition("@")
    return f"process {pid}" + (f" on {host}" if host != platform.node() else "")


def _remove_dead_builds(directory: Path) -> None:
    """Remove temporary directories of killed builds. A build is dead if its lock is free. The caller holds the lock of
    `directory`."""
    from filelock import FileLock, Timeout

    for leftover in directory.parent.glob("*.building-*"):
        name = leftover.name.partition(".building-")[0]
        if name == directory.name:
            shutil.rmtree(leftover, ignore_errors=True)
            continue
        lock = FileLock(_lock_path(leftover.with_name(name)))
        try:
            lock.acquire(blocking=False)
        except Timeout:
            continue
        shutil.rmtree(leftover, ignore_errors=True)
        lock.release()


def _flush(directory: Path) -> None:
    """Flush all files below `directory` to the disk."""
    for path in (*directory.rglob("*"), directory):
        _fsync(path)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class HashMemo:
    """Remembers hashes of file contents by path, size, inode and time stamps, so unchanged files are read only once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known = self._load()
        self._unsettled: set[str] = set()

    def digests(self, files: Sequence[Path]) -> list[str]:
        """blake2b of the contents of each file.

        Raises:
            DataError: a file cannot be read, or changes while it is read.
        """
        keys = [str(file.absolute()) for file in files]
        if not all(self._is_known(key) for key in keys):
            waiting = "waiting for another process, which looks for changes in the sources"
            try:
                with _locked(self._path.with_suffix(".lock"), lambda: say(waiting)):
                    self._known = self._load() | {key: self._known[key] for key in self._unsettled}
                    self._hash_all([key for key in keys if not self._is_known(key)])
                    with writing(self._path):
                        self._save()
            except NotWritten:  # a read-only cache may have the data; the next start hashes these files again
                if unknown := [key for key in keys if not self._is_known(key)]:
                    self._hash_all(unknown)
        return [self._known[key][-1] for key in keys]

    def _is_known(self, key: str) -> bool:
        return key in self._known and self._known[key][:-1] == _identity(key)

    def _hash_all(self, keys: list[str]) -> None:
        size_bytes = sum(_identity(key)[0] for key in keys)
        with progress(f"hashing {len(keys):,} new or changed files", size_bytes, "bytes") as shown:
            for key in keys:
                self._hash(key, shown)

    def _hash(self, key: str, shown: Progress) -> None:
        before = _identity(key)
        try:
            with Path(key).open("rb") as file:
                digest = _digest(file, shown)
        except OSError as error:
            raise DataError(f"{key}: cannot be read ({error.strerror}). Check the file and its permissions.") from error
        if _identity(key) != before:
            raise DataError(f"{key}: the file changes while it is read. Start again when it is complete.")
        self._known[key] = [*before, digest]
        _, _, modified_ns, changed_ns = before
        if time.time_ns() - max(modified_ns, changed_ns) < SETTLED_AFTER_NS:
            self._unsettled.add(key)
        else:
            self._unsettled.discard(key)

    def _load(self) -> dict[str, list[Any]]:
        try:
            return json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # without the memo, all files are hashed again

    def _save(self) -> None:
        new = self._path.with_suffix(".new")  # one name is enough: the lock is held
        new.write_text(json.dumps({k: v for k, v in self._known.items() if k not in self._unsettled}), encoding="utf-8")
        new.rename(self._path)


def _digest(file: BinaryIO, shown: Progress) -> str:
    digest = hashlib.blake2b()
    while block := file.read(_HASHED_AT_ONCE):
        digest.update(block)
        shown.advance(len(block))
    return digest.hexdigest()


def _identity(path: str) -> list[int]:
    """Size in bytes, inode, and the times in ns of the last change of the contents and of the inode."""
    try:
        stat = os.stat(path)  # noqa: PTH116  # faster than Path.stat for the hundreds of files of a cache hit
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
