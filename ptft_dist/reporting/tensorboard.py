"""TensorBoard as a writer of metrics."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptft_dist.config.load import Loaded, flat, given_values, public_values
from ptft_dist.config.secrets import hide
from ptft_dist.reporting.messages import warn
from ptft_dist.reporting.metrics import scalars

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Writes TensorBoard scalars by step. A resume purges the points after the checkpoint.

    The first start also writes the recipe as text, the hyperparameters, and a chart of both losses ("Custom Scalars").
    After an error of the disk the run continues without TensorBoard; metrics.jsonl has the same numbers.
    """

    def __init__(self, folder: Path, last_step: int, loaded: Loaded) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        # A start from update 0 purges too: a run killed before its first checkpoint may have left points.
        self.writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=last_step + 1 if last_step else 0)
        if not last_step:
            self._try(lambda writer: _write_recipe(writer, loaded))

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


def _write_recipe(writer: SummaryWriter, loaded: Loaded) -> None:
    """The recipe as given and with every value, its values that are not defaults as hyperparameters, and the charts."""
    from torch.utils.tensorboard.summary import hparams

    metric = f"eval/{loaded.recipe.eval.metric}"
    every = flat(public_values(loaded))
    given = [f"{key}: {every.get(key)}" for key, origin in loaded.origins.items() if origin == "command line"]
    texts = {"as given": hide(loaded.text), "from the command line": "\n".join(given)}
    texts["with every value"] = hide(loaded.resolved)
    shown = "\n\n".join(f"**{title}**\n\n{_verbatim(text)}" for title, text in texts.items() if text)
    writer.add_text("recipe", shown, 0)
    values = {key: value for key, value in flat(given_values(loaded)).items() if not str(value).startswith("[")}
    values = {key: value for key, value in values.items() if value is not None}
    file: Any = writer.file_writer
    for summary in hparams(values, dict.fromkeys(["train/loss", "eval/loss", metric], 0.0)):
        file.add_summary(summary)  # add_hparams would also write points, as a run of their own
    charts = {"training and validation loss": ["Multiline", ["^train/loss$", "^eval/loss$"]]}
    if metric != "eval/loss":
        charts[loaded.recipe.eval.metric] = ["Multiline", [f"^{metric}$"]]
    writer.add_custom_scalars({"overview": charts})


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
        parts.append(f"**{key}**\n\n{_verbatim(text)}")
    return "\n\n".join(parts)


def _verbatim(text: str) -> str:
    """A block of code in Markdown."""
    return "\n".join("    " + line for line in text.splitlines() or [""])
