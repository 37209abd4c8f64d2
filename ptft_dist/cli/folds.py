"""Cross-validation: one recipe, every fold a run of its own, one after the other; then the scores over all folds."""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ptft_dist.api import load_recipe
from ptft_dist.config.load import Loaded, dump_resolved
from ptft_dist.errors import EXIT_FINISHED, EXIT_STOPPED, RecipeError
from ptft_dist.reporting.messages import say

_BY_SIGNAL = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # before the fold had begun to listen


def train_folds(loaded: Loaded, name: str, overrides: Sequence[str], options: Sequence[str], *, writes: bool) -> int:
    """Run each fold as `ptft train` in <run_dir>/fold-<i>, but those that have finished; the exit code.

    A fold that fails ends all with its exit code. After SIGTERM or SIGINT, which go on to the running fold, this
    returns 75, and the next start goes on there.

    Args:
        name: the recipe as the command line names it, followed by `overrides` and `options`.
        writes: write folds.json; of several machines one does.

    Raises:
        RecipeError: the options fit one run only.
    """
    resume = options[options.index("--resume") + 1]
    if resume not in ("auto", "never"):
        raise RecipeError(
            "--resume: a checkpoint belongs to one fold. Choose that with data.fold, or leave --resume out"
        )
    run_dir, folds = Path(loaded.recipe.run_dir), loaded.recipe.data.folds or 0
    stop = _Stop()
    for i in range(folds):
        fold = [*overrides, f"data.fold={i}", f"run_dir={json.dumps(str(run_dir / f'fold-{i}'))}"]
        if resume == "auto" and _finished(load_recipe(name, fold)):
            say(f"fold {i} of {folds}: finished before")
            continue
        say(f"fold {i} of {folds}: {run_dir / f'fold-{i}'}")
        code = stop.run([sys.executable, "-m", "ptft_dist", "train", name, *fold, *options])
        if stop.asked and code in (EXIT_FINISHED, EXIT_STOPPED, *_BY_SIGNAL):
            code = EXIT_STOPPED
        if code != EXIT_FINISHED:
            say(f"fold {i} of {folds} ended with exit code {code}; the same command goes on with it")
            return code
    if writes:
        summary = summarize([_result(run_dir / f"fold-{i}")["metrics"] for i in range(folds)])
        (run_dir / "folds.json").write_text(json.dumps({"folds": folds, "metrics": summary}, indent=1) + "\n")
        say(describe(summary, folds))
        say(f"  {'scores':<24} {run_dir / 'folds.json'}")
    return EXIT_FINISHED


def summarize(metrics: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Of each metric: its mean over folds, the sample standard deviation, and each fold's value."""
    values = {name: [fold[name] for fold in metrics] for name in metrics[0]}
    return {
        name: {"mean": statistics.fmean(each), "std": statistics.stdev(each), "values": each}
        for name, each in values.items()
    }


def describe(summary: dict[str, dict[str, Any]], folds: int) -> str:
    lines = [f"  {name:<24} {one['mean']:.4g} +- {one['std']:.2g}" for name, one in summary.items()]
    return "\n".join([f"mean and sample standard deviation over {folds} folds:", *lines])


def _finished(fold: Loaded) -> bool:
    """The fold's run directory holds a finished run of this very recipe. With other settings it is started again, and
    refuses what does not fit its checkpoints."""
    run_dir = Path(fold.recipe.run_dir)
    try:
        same = (run_dir / "resolved.yaml").read_text(encoding="utf-8") == dump_resolved(fold)
    except OSError:
        return False
    return same and _result(run_dir).get("status") == "finished"


def _result(run_dir: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return {}


class _Stop:
    """Passes signals on to the running fold."""

    def __init__(self) -> None:
        self.asked = False
        self.child: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.asked = True
        if self.child is not None:
            self.child.send_signal(number)

    def run(self, words: list[str]) -> int:
        """The child's exit code; nothing is started any more once a signal has come."""
        if self.asked:
            return EXIT_STOPPED
        # In a session of its own: a terminal's Ctrl-C then reaches it once, through here.
        self.child = subprocess.Popen(words, start_new_session=True)
        if self.asked:  # between the two lines above
            self.child.terminate()
        code = self.child.wait()
        self.child = None
        return code if code >= 0 else 128 - code
