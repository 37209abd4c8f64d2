"""One start of a trial of a sweep: training, pruning, and its end in the study."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ptft_dist.errors import EXIT_DISK, EXIT_FINISHED, EXIT_LOST, EXIT_STOPPED, RecipeError
from ptft_dist.launch.result import read_json
from ptft_dist.reporting.messages import plain, say
from ptft_dist.reporting.run_files import lock_run_dir
from ptft_dist.runs.local import WATCH_EVERY_S, LocalExecutor
from ptft_dist.runs.run_list import Run, is_finished
from ptft_dist.runs.study import Status, Study, Trial

STOP = "stop"
"""The file that asks a run to stop."""
ENDS_THE_SWEEP = (2, 3, 4, EXIT_LOST, EXIT_STOPPED, EXIT_DISK)
"""Exit codes of a trial that say nothing about its values: it stays unfinished, and the sweep ends."""


class Attempt:
    """One start of a trial: trains it, judges its evaluations meanwhile, and records its end."""

    def __init__(self, study: Study, trial: Trial, run: Run, metric: str, *, log: Path | None) -> None:
        """log: the file for the output of the run. Default: it goes to that of this process."""
        self.log = log
        self.study, self.number, self.run = study, trial.number, run
        self.evaluations = Evaluations(run.run_dir / "metrics.jsonl", metric)
        self.judged = 0
        self.pruned = trial.pruned
        self.told = False

    def make(self, executor: LocalExecutor, options: Sequence[str], variables: Mapping[str, str]) -> int:
        """Train; the exit code: 0 if the trial has ended in any way, else one of ENDS_THE_SWEEP.

        Args:
            options: options of `ptft train`.
            variables: added to its environment.

        Raises:
            RecipeError: the recipe does not accept the values of the trial.
        """
        run = self.run
        try:
            run.load()
        except RecipeError as error:
            raise RecipeError(f"{run.name}: {error}") from None
        self.watch()
        code = self._train(executor, options, variables)
        self.watch()
        (run.run_dir / STOP).unlink(missing_ok=True)
        if self.pruned is not None:
            step, value = self.pruned
            self._end("pruned", value, step)
        elif code == EXIT_FINISHED:
            result = read_json(run.run_dir / "result.json")
            value = result.get("metrics", {}).get(self.evaluations.metric)
            usable = value is not None and math.isfinite(value)
            self._end("finished" if usable else "failed", value if usable else None, result.get("steps", 0), code)
        elif code in ENDS_THE_SWEEP:
            say(f"{run.name} ended with exit code {code}{self._see()}. The same command continues with it.")
            return code
        else:
            self._end("failed", None, self.evaluations.last_step, code)
        return EXIT_FINISHED

    def _train(self, executor: LocalExecutor, options: Sequence[str], variables: Mapping[str, str]) -> int:
        """The exit code of the run. Waits for a process of an earlier sweep that was killed while its trial went on."""
        waits = False
        while not executor.stop_requested:
            if not _is_locked(self.run.run_dir):
                if self.pruned is not None or is_finished(self.run):
                    return EXIT_FINISHED
                code = executor(self.run, options, watch=self.watch, variables=variables, log=self.log)
                if code != RecipeError.exit_code or not _is_locked(self.run.run_dir):
                    return code
            if not waits:
                say(f"{self.run.name}: waiting for a process of an earlier start that trains in {self.run.run_dir}")
            waits = True
            time.sleep(WATCH_EVERY_S)
            self.watch()
        return EXIT_STOPPED

    def watch(self) -> None:
        """Judge new evaluations, and ask the run to stop if it is to be pruned.

        The last evaluation is not judged: there is nothing left to save. Whether an evaluation is judged depends on
        its update alone, not on when it is seen.
        """
        new = self.evaluations.read()
        if self.study.search.prune is None:
            return
        last = read_json(self.run.run_dir / "environment.json").get("updates", math.inf)
        for step, value in new:
            if self.pruned is None and 0 < step < last:
                self.judged += 1
                if self.study.report(self.number, self.judged, step, value):
                    self.pruned = step, value
        if self.pruned is not None and not self.told:
            self.told = True
            (self.run.run_dir / STOP).write_text("pruned by ptft sweep\n")

    def _end(self, status: Status, value: float | None, updates: int, code: int | None = None) -> None:
        self.study.end(self.number, status, value, updates=updates, exit_code=code if status == "failed" else None)
        metric = self.evaluations.metric
        text = f"{metric} {plain(value)}" if value is not None else cause(code, metric) + self._see()
        say(f"{self.run.name}: {status} after update {updates}, {text}")

    def _see(self) -> str:
        return "" if self.log is None else f" (see {self.log})"


def cause(exit_code: int | None, metric: str) -> str:
    """The cause of a failed trial, in words."""
    return f"no finite {metric}" if exit_code == EXIT_FINISHED else f"exit code {exit_code}"


def _is_locked(run_dir: Path) -> bool:
    try:
        lock_run_dir(run_dir).release()
    except RecipeError:
        return True
    return False


class Evaluations:
    """Reads the evaluations in metrics.jsonl while a run writes it. A resume replaces the file by a shorter one."""

    def __init__(self, path: Path, metric: str) -> None:
        self.path, self.metric = path, metric
        self.last_step = 0
        """The last update in the file."""
        self._last = -1
        self._file, self._position = -1, 0

    def read(self) -> list[tuple[int, float]]:
        """Update and value of the evaluations since the last call, each once."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._file or status.st_size < self._position:
                    self._file, self._position = status.st_ino, 0
                file.seek(self._position)
                text = file.read()
        except FileNotFoundError:
            return []
        text = text[: text.rfind(b"\n") + 1]  # the last line may be incomplete
        self._position += len(text)
        found = []
        for line in text.splitlines():
            row = json.loads(line)
            self.last_step = row["step"]
            if self.metric in row and row["step"] > self._last:
                self._last = row["step"]
                found.append((self._last, float(row[self.metric])))
        return found
