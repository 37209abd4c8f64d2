"""Reads the files of a run directory for reports."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ptft_dist.config.document import Document, leaves
from ptft_dist.config.section import dotted
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.launch.result import ENVIRONMENT, RESULT, read_json
from ptft_dist.pages.evaluation import Evaluation, read_evaluation

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"
EVAL = "eval/"
_EVAL_TIME = "eval/time_s"


@dataclass(frozen=True)
class RunFiles:
    """The contents of a run directory."""

    path: Path
    name: str
    """For tables and legends."""
    rows: list[dict[str, Any]] = field(repr=False)
    """metrics.jsonl: rows of updates and of evaluations, in order."""
    result: dict[str, Any]
    """result.json; empty while the run trains, or if it was killed."""
    environment: dict[str, Any] = field(repr=False)
    data_report: dict[str, Any] = field(repr=False)
    recipe: str = field(repr=False)
    """recipe.yaml as text."""
    resolved_text: str = field(repr=False)
    """resolved.yaml as text."""
    samples: list[dict[str, Any]] = field(repr=False)
    """The samples of the last evaluation."""
    evaluation: Evaluation | None
    """The result of `ptft evaluate`."""

    @cached_property
    def values(self) -> dict[str, Any]:
        """Every value of the recipe by its dotted key, with references as written. Raises DataError."""
        document = Document()
        document.read(self.resolved_text)
        if document.mistakes:
            mistake = document.mistakes[0]
            raise DataError(f"{self.path / 'resolved.yaml'}:{mistake.line}: {mistake.text}; restore the file")
        return {dotted(path): value for path, value in leaves(document.values or {})}

    @property
    def status(self) -> str:
        """finished, stopped, failed, or `not finished` without a result."""
        return str(self.result.get("status", "not finished"))

    @property
    def updates(self) -> int:
        """The last update."""
        return int(self.result.get("steps") or (self.rows[-1]["step"] if self.rows else 0))

    @property
    def tokens(self) -> int:
        """Tokens of all updates so far."""
        return int(self.result.get("tokens") or next((r["tokens"] for r in reversed(self.rows) if "tokens" in r), 0))

    @cached_property
    def evaluations(self) -> list[tuple[int, dict[str, float]]]:
        """The evaluations in order: update, and metrics by name without `eval/`."""
        rows = [(row["step"], eval_metrics(row)) for row in self.rows]
        return [(step, metrics) for step, metrics in rows if metrics]

    @property
    def final(self) -> tuple[int, dict[str, float]]:
        """Update and metrics of the exported model; otherwise those of the last evaluation. (-1, {}): none."""
        if self.result.get("metrics"):
            return self.result["metrics_step"], eval_metrics(self.result["metrics"])
        return self.evaluations[-1] if self.evaluations else (-1, {})


def eval_metrics(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of an evaluation, by name without `eval/`."""
    return {key.removeprefix(EVAL): row[key] for key in row if key.startswith(EVAL) and key != _EVAL_TIME}


def read_run(run_dir: Path, name: str | None = None, *, evaluation: bool = True) -> RunFiles:
    """Read the files of a run, whether it has finished or not.

    Args:
        name: default: that of the directory.
        evaluation: also read the files of `ptft evaluate`.

    Raises:
        RecipeError: this is no run directory.
        DataError: the run has no metrics, or a file is damaged.
    """
    if not (run_dir / "resolved.yaml").is_file():
        raise RecipeError(f"{run_dir}: no run directory (it has no resolved.yaml).{_runs_inside(run_dir)}")
    rows = list(_json_lines(run_dir / METRICS))
    if not rows:
        raise DataError(f"{run_dir / METRICS}: no metrics yet. Train first, or wait for the first update.")
    return RunFiles(
        path=run_dir,
        name=name or run_dir.resolve().name,
        rows=rows,
        result=read_json(run_dir / RESULT),
        environment=read_json(run_dir / ENVIRONMENT),
        data_report=read_json(run_dir / "data_report.json"),
        recipe=_text(run_dir / "recipe.yaml"),
        resolved_text=_text(run_dir / "resolved.yaml"),
        samples=_last_samples(list(_json_lines(run_dir / SAMPLES))),
        evaluation=read_evaluation(run_dir) if evaluation else None,
    )


def read_runs(run_dirs: list[Path]) -> list[RunFiles]:
    """Read several runs. Each has the name of its directory if these differ, otherwise its path.

    Raises:
        RecipeError: fewer than two runs, one run twice, or a directory that is no run.
        DataError: a run has no metrics, or a file is damaged.
    """
    if len(run_dirs) < 2:
        raise RecipeError("compare: name at least two run directories, or use ptft report for one")
    places = [run_dir.resolve() for run_dir in run_dirs]
    for i, place in enumerate(places):
        if place in places[:i]:
            raise RecipeError(f"{run_dirs[i]}: this run is named twice. Name different runs")
    names = [place.name for place in places]
    distinct = len(set(names)) == len(names)
    return [read_run(run_dir, None if distinct else str(run_dir)) for run_dir in run_dirs]


def _runs_inside(folder: Path) -> str:
    """A hint for a directory of runs, such as that of a cross-validation."""
    runs = sorted(path.parent for path in folder.glob("*/resolved.yaml"))
    if not runs:
        return " Name the run_dir of a recipe."
    return f" Name the runs in it: {' '.join(map(str, runs[:3]))}{' ...' if len(runs) > 3 else ''}"


def _last_samples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the last evaluation. Rows with a phase are of a rollout; they count only without evaluations."""
    evaluated = [row for row in rows if "phase" not in row] or rows
    return [row for row in evaluated if row["step"] == evaluated[-1]["step"]]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that a run writes; none if it is missing. The last line may be incomplete.

    Raises:
        DataError: another line is damaged.
    """
    lines = _text(path).split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row.get("step"), int):
                raise ValueError
        except (ValueError, AttributeError):
            if number == len(lines):
                return
            raise DataError(
                f"{path}:{number}: not a JSON object with a step; remove this line, or restore the file"
            ) from None
        yield row


def _text(path: Path) -> str:
    """Raises DataError if the file cannot be read; an absent file is empty."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
