"""TensorBoard as a writer of metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptft_dist.reporting.messages import warn
from ptft_dist.reporting.metrics import scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


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
            for tag, value in scalars(row).items():
                writer.add_scalar(tag, value, row["step"])

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
