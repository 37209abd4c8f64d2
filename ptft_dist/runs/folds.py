"""k-fold cross-validation: one run per fold, and the mean and standard deviation of their metrics."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptft_dist.config.load import Loaded
from ptft_dist.errors import EXIT_FINISHED, RecipeError
from ptft_dist.reporting.messages import say
from ptft_dist.reporting.output import write_text
from ptft_dist.runs.local import LocalExecutor
from ptft_dist.runs.run_list import Run, aligned, collect, run_all


def fold_runs(loaded: Loaded, recipe: str, overrides: Sequence[str]) -> list[Run]:
    """The run of each fold, in <run_dir>/fold-<i>.

    Args:
        loaded: the recipe with data.folds, loaded from `recipe` and `overrides`.
    """
    run_dir, folds = Path(loaded.recipe.run_dir), loaded.recipe.data.folds or 0
    return [
        Run(f"fold {i} of {folds}", recipe, (*overrides, f"data.fold={i}"), run_dir / f"fold-{i}") for i in range(folds)
    ]


def check_resume(resume: str) -> None:
    """Raises RecipeError if --resume of a run with all folds is a checkpoint."""
    if resume not in ("auto", "never"):
        raise RecipeError(
            "--resume: a checkpoint belongs to one fold. Choose the fold with data.fold, or leave --resume out."
        )


def train_folds(
    loaded: Loaded, recipe: str, overrides: Sequence[str], *, resume: str, options: Sequence[str], writes: bool
) -> int:
    """Train every fold that has not finished, write folds.json and return the exit code.

    Args:
        resume: `auto`, or `never` to train finished folds again too.
        options: other options of `ptft train`.
        writes: write folds.json. Of several machines one does.

    Raises:
        RecipeError: `resume` is a checkpoint, which belongs to one fold.
    """
    check_resume(resume)
    runs, executor = fold_runs(loaded, recipe, overrides), LocalExecutor()
    with executor.forwarding_signals():
        code = run_all(runs, ["--resume", resume, *options], executor, skip_finished=resume == "auto")
    if code == EXIT_FINISHED and writes:
        summarize_folds(loaded, recipe, overrides)
    return code


def summarize_folds(loaded: Loaded, recipe: str, overrides: Sequence[str]) -> None:
    """Write folds.json from the results of all folds, and print it.

    Raises:
        RecipeError: the recipe has no folds.
        PtftError: a fold has not finished.
    """
    if not loaded.recipe.data.all_folds:
        raise RecipeError("data.folds: not set, or one fold is chosen by data.fold; there is no table")
    results = collect(fold_runs(loaded, recipe, overrides))
    _write_summary(Path(loaded.recipe.run_dir), [result["metrics"] for result in results])


def summarize(metrics: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """For each metric: the mean over the runs, the sample standard deviation (divisor n - 1), and each run's value."""
    values = {name: [each[name] for each in metrics] for name in metrics[0]}
    return {
        name: {"mean": statistics.fmean(each), "std": statistics.stdev(each), "values": each}
        for name, each in values.items()
    }


def _write_summary(run_dir: Path, metrics: Sequence[Mapping[str, float]]) -> None:
    summary, path = summarize(metrics), run_dir / "folds.json"
    write_text(path, json.dumps({"folds": len(metrics), "metrics": summary}, indent=1) + "\n")
    say(f"each fold, and mean +- sample standard deviation over {len(metrics)} folds:")
    rows = [["metric", *(f"fold {fold}" for fold in range(len(metrics))), "mean +- std"]]
    for name, each in summary.items():
        values = [f"{value:.4g}" for value in each["values"]]
        rows.append([name, *values, f"{each['mean']:.4g} +- {each['std']:.2g}"])
    for line in aligned(rows):
        say(f"  {line}")
    say(f"  summary  {path}")
