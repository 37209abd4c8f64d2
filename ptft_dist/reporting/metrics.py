"""Writers of metrics: metrics.jsonl, TensorBoard and the terminal."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from ptft_dist.reporting.messages import clock, warn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Keys of metrics.jsonl that depend on time or machine; all others are equal in a repeated run.
TIMING_KEYS = frozenset(
    {"time_s", "tokens_per_s", "mfu", "memory_bytes", "eval/time_s", "generation_s", "scoring_s", "samples_per_s"}
)


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


class TensorBoard:
    """Writes TensorBoard scalars by step. A resume purges the points after the checkpoint.

    After an error of the disk the run continues without TensorBoard; metrics.jsonl has the same numbers.
    """

    def __init__(self, folder: Path, last_step: int, recipe_text: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        # A start from update 0 purges too: a run killed before its first checkpoint may have left points.
        self.writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=last_step + 1 if last_step else 0)
        if not last_step:
            fenced = "\n".join("    " + line for line in recipe_text.splitlines())
            self.writer.add_text("recipe", fenced, 0)

    def write(self, row: Mapping[str, Any]) -> None:
        def add(writer: SummaryWriter) -> None:
            for key, value in row.items():
                if key != "step" and isinstance(value, int | float):
                    writer.add_scalar(key if "/" in key else f"train/{key}", value, row["step"])

        self._try(add)

    def show(self, samples: Sequence[Mapping[str, Any]]) -> None:
        text = "\n\n---\n\n".join(_as_markdown(sample) for sample in samples)
        self._try(lambda writer: writer.add_text("samples", text, samples[0]["step"]))

    def flush(self) -> None:
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        self._try(lambda writer: writer.close())

    def _try(self, action: Callable[[SummaryWriter], None]) -> None:
        if self.writer is None:
            return
        try:
            action(self.writer)
        except OSError as error:
            warn(f"{self.folder}: {error.strerror}; TensorBoard gets no more points until the next start")
            self.writer = None


def add_evaluation(folder: Path, step: int, metrics: Mapping[str, float], tables: Mapping[str, Any]) -> None:
    """Add the result of `ptft evaluate` to a run's TensorBoard: scalars `evaluate/...`, and the tables as text.

    An error of the disk is a warning, because the files of the evaluation have the same numbers.
    """
    from torch.utils.tensorboard import SummaryWriter

    try:
        with SummaryWriter(str(folder)) as writer:
            for name, value in metrics.items():
                writer.add_scalar(f"evaluate/{name.removeprefix('eval/')}", value, step)
            writer.add_text("evaluate", _as_markdown(tables), step)
    except OSError as error:
        warn(f"{folder}: {error.strerror}; TensorBoard does not get the evaluation")


def _as_markdown(sample: Mapping[str, Any]) -> str:
    """The fields of a sample, each text in a block of its own, since it may contain any characters."""
    parts = []
    for key, value in sample.items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        parts.append(f"**{key}**\n\n" + "\n".join("    " + line for line in text.splitlines() or [""]))
    return "\n\n".join(parts)


class Terminal:
    """Shows a live line on a terminal, otherwise a plain line every few seconds, so that logs stay short."""

    PLAIN_EVERY_S = 10.0

    def __init__(self, total_steps: int, first_step: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.total_steps, self.first_step = total_steps, first_step
        self.started, self.last_plain = time.monotonic(), 0.0
        self.live = self.stream.isatty()

    def write(self, row: Mapping[str, Any]) -> None:
        if any(key.startswith("eval/") for key in row):
            shown = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if k.startswith("eval/") and k != "eval/time_s")
            self._line(f"step {row['step']:,}  {shown}", keep=True)
            return
        step, now = row["step"], time.monotonic()
        ended = step == self.total_steps
        if not self.live and not ended and now - self.last_plain < self.PLAIN_EVERY_S:
            return
        self.last_plain = now
        left_s = (now - self.started) / max(1, step - self.first_step) * (self.total_steps - step)
        text = f"step {step:,}/{self.total_steps:,}  loss {row['loss']:.4f}  lr {row['lr']:.2e}"
        text += f"  {row['tokens_per_s']:,.0f} tokens/s  {clock(left_s)} left"
        self._line(text, keep=not self.live or ended)

    def _line(self, text: str, keep: bool) -> None:
        start, end = ("\r\x1b[2K", "\n" if keep else "") if self.live else ("", "\n")
        print(start + text, end=end, file=self.stream, flush=True)

    def show(self, samples: Sequence[Mapping[str, Any]]) -> None: ...

    def flush(self) -> None:
        pass

    def close(self) -> None:
        if self.live:
            print(file=self.stream, flush=True)
