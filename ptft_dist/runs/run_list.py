"""Lists of runs: which of them have finished, running the others in order, and collecting their results.

Cross-validation (folds.py) and sweeps (sweep.py) make such lists. What executes a run is exchangeable: see `Executor`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ptft_dist.api import input_fingerprint, load_recipe, values_of_environment
from ptft_dist.config.load import Loaded
from ptft_dist.errors import EXIT_FINISHED, PtftError
from ptft_dist.launch.result import read_json
from ptft_dist.reporting.messages import say


@dataclass(frozen=True)
class Run:
    """One run: a recipe with overrides and a separate run directory."""

    name: str
    """For messages, such as `fold 0 of 5`."""
    recipe: str
    """A file, or the name of a shipped recipe."""
    overrides: tuple[str, ...]
    """Values to set, such as `optim.lr=1e-4`, without run_dir."""
    run_dir: Path

    @property
    def words(self) -> list[str]:
        """The recipe and every value to set, as words of a `ptft` command."""
        return [self.recipe, *self.overrides, f"run_dir={json.dumps(str(self.run_dir))}"]

    @property
    def command(self) -> list[str]:
        """The words after `ptft` that train this run."""
        return ["train", *self.words]

    def load(self) -> Loaded:
        """The recipe of this run. Raises RecipeError."""
        recipe, *overrides = self.words
        return load_recipe(recipe, overrides, training=True)


Executor = Callable[[Run, Sequence[str]], int]
"""Trains one run with these options of `ptft train` and returns its exit code: see local.py."""


def run_all(runs: Iterable[Run], options: Sequence[str], executor: Executor, *, skip_finished: bool = True) -> int:
    """Train the runs in order and return the exit code.

    A run that does not finish, because it failed or was stopped, ends the list with its exit code. The same call
    continues with that run.

    Args:
        options: options of `ptft train` for every run.
        skip_finished: do not start a run that `is_finished`; False with --resume never.

    Raises:
        RecipeError, DataError: a run's recipe or its inputs cannot be read.
    """
    for run in runs:
        if skip_finished and is_finished(run):
            say(f"{run.name}: already finished in {run.run_dir}")
            continue
        code = executor(run, options)
        if code != EXIT_FINISHED:
            over = "" if skip_finished else " without --resume never"  # which would start all runs over
            say(f"{run.name} ended with exit code {code}. The same command{over} continues with it.")
            return code
    return EXIT_FINISHED


class Finishable(Protocol):
    """A run, or a stage of a pipeline that trains."""

    @property
    def run_dir(self) -> Path: ...

    def load(self) -> Loaded: ...


def is_finished(run: Finishable) -> bool:
    """Whether the run directory contains a finished run with the same recipe and the same data.

    All values of the recipe and the contents of the data and tokenizer files are compared, but not the weights of a
    pretrained model. A run that is not finished is started again. It resumes from its last checkpoint, or fails if the
    checkpoint does not fit.

    Raises:
        RecipeError, DataError: the recipe or its inputs cannot be read.
    """
    if read_json(run.run_dir / "result.json").get("status") != "finished":
        return False
    loaded = run.load()
    try:
        resolved = (run.run_dir / "resolved.yaml").read_text(encoding="utf-8")
    except OSError:
        return False
    environment = read_json(run.run_dir / "environment.json")
    if resolved != loaded.resolved or environment.get("variables", {}) != values_of_environment(loaded):
        return False
    return environment.get("inputs") == input_fingerprint(loaded)


def collect(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """The contents of each run's result.json, in order.

    Raises:
        PtftError: a run has not finished.
    """
    results = [(run, read_json(run.run_dir / "result.json")) for run in runs]
    unfinished = [run.name for run, result in results if result.get("status") != "finished"]
    if unfinished:
        raise PtftError(f"{', '.join(unfinished)}: no finished result in the run directory. Train it first.")
    return [result for _, result in results]


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """The rows of a table as lines, with cells of equal width in each column."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
