"""Rows of metrics: their interface, their tags, and metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

from ptft_dist.reporting.messages import warn

METRICS = "metrics.jsonl"

# Keys of metrics.jsonl that depend on time or machine; all others are equal in a repeated run.
TIMING_KEYS = frozenset(
    {"time_s", "tokens_per_s", "mfu", "memory_bytes", "eval/time_s", "generation_s", "scoring_s", "samples_per_s"}
)


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row by their tag in TensorBoard and trackers: `train/...`, `eval/...` or `speed/...`."""
    return {tag(key): value for key, value in row.items() if key != "step" and isinstance(value, int | float)}


def tag(key: str) -> str:
    """`train/loss` of loss, `eval/loss` of eval/loss, `speed/eval_time_s` of eval/time_s."""
    if key in TIMING_KEYS:
        return f"speed/{key.replace('/', '_')}"
    return key if key.startswith("eval/") else f"train/{key}"


class Sink(Protocol):
    def write(self, row: Mapping[str, Any]) -> None: ...
    def show(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Show generated texts of one update."""

    def flush(self) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """Writes metrics.jsonl: one object per line. A resume first removes the rows after the checkpoint.

    A full disk does not end the run. Rows that cannot be written are kept in memory and written with later ones.
    """

    def __init__(self, path: Path, last_step: int, last_evaluation: int) -> None:
        """last_step: the checkpoint's update, 0 without a checkpoint. last_evaluation: the last update that was
        evaluated before it."""
        self.path = path
        self.pending: list[str] = []
        if path.exists():
            _cut_after(path, last_step, last_evaluation)
        self.file = self._open()

    def _open(self) -> TextIO:
        return self.path.open("a", encoding="utf-8", errors="backslashreplace")

    def write(self, row: Mapping[str, Any]) -> None:
        self.pending.append(json.dumps(row, ensure_ascii=False) + "\n")  # keep texts of all scripts readable
        position = self.file.tell()
        try:
            self.file.write("".join(self.pending))
            self.file.flush()
        except OSError as error:
            if len(self.pending) == 1:
                warn(f"{self.path}: {error.strerror}; its rows are kept in memory until it can be written again")
            self._drop_torn_bytes(position)
        else:
            self.pending.clear()

    def _drop_torn_bytes(self, position: int) -> None:
        descriptor = os.dup(self.file.fileno())
        with contextlib.suppress(OSError):  # `pending` still holds what cannot be flushed
            self.file.close()
        os.ftruncate(descriptor, position)
        os.close(descriptor)
        self.file = self._open()

    def show(self, samples: Sequence[Mapping[str, Any]]) -> None: ...

    def flush(self) -> None:
        """Flush all rows to the disk. Called before a checkpoint is committed."""
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            warn(f"{self.path}: {error.strerror}; rows up to here may be lost")

    def close(self) -> None:
        if self.pending:
            warn(f"{self.path}: {len(self.pending)} rows could not be written")
        self.file.close()


def _cut_after(path: Path, last_step: int, last_evaluation: int) -> None:
    """Remove the rows after a checkpoint, and an incomplete last line. The file is replaced atomically.

    A start from update 0 removes all rows. The evaluation of an update follows its save, so its row may be newer than
    the checkpoint.
    """
    kept = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        newest = last_step if "loss" in row or "phase" in row else min(last_step, last_evaluation)
        if last_step and row["step"] <= newest:
            kept.append(line + b"\n")
    replacement = path.with_name(path.name + ".new")
    replacement.write_bytes(b"".join(kept))
    replacement.replace(path)
