"""Sweeps: many runs of one recipe with different values, the table of their metrics, and the best recipe.

A trial is a `Run` in SWEEP_DIR/trial-0000, ...; study.py says which one is next. Several threads of one command, and
several commands on the same directory, take trials from the same study.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptft_dist.api import input_fingerprint, load_recipe
from ptft_dist.config.document import leaves
from ptft_dist.config.load import Loaded, edited, public_values, starts_at, to_yaml
from ptft_dist.config.section import dotted
from ptft_dist.errors import EXIT_DISK, EXIT_FINISHED, EXIT_LOST, EXIT_STOPPED, PtftError, RecipeError
from ptft_dist.launch.result import read_json
from ptft_dist.reporting.messages import plain, say
from ptft_dist.reporting.run_files import lock_run_dir
from ptft_dist.runs.local import WATCH_EVERY_S, LocalExecutor
from ptft_dist.runs.run_list import Run, is_finished
from ptft_dist.runs.search import Search, SearchFile, check_search, words
from ptft_dist.runs.study import Claim, Status, Study, Trial

TABLE, BEST, STOP = "sweep.json", "best.yaml", "stop"
ENDS_THE_SWEEP = (2, 3, 4, EXIT_LOST, EXIT_STOPPED, EXIT_DISK)
"""Exit codes of a trial that say nothing about its values: it stays unfinished, and the sweep ends."""
_ORDER: tuple[Status, ...] = ("finished", "pruned", "failed", "unfinished")


@dataclass(frozen=True)
class Sweep:
    """A recipe, a search and the directory of the trials. See `open_sweep`."""

    recipe: str
    overrides: tuple[str, ...]
    """What is set in every trial, without run_dir."""
    loaded: Loaded
    """The recipe with these overrides."""
    search: Search
    folder: Path
    study: Study

    @property
    def metric(self) -> str:
        return f"eval/{self.loaded.recipe.eval.metric}"

    def run(self, trial: Trial) -> Run:
        name = f"trial {trial.number} of {self.search.count}"
        overrides = (*self.overrides, *words(trial.parameters))
        return Run(name, self.recipe, overrides, self.folder / trial.name)

    def sorted_trials(self) -> list[Trial]:
        """The trials, best first; those without a comparable value at the end, by number."""
        sign = -1 if self.loaded.recipe.eval.larger_is_better else 1

        def key(trial: Trial) -> tuple[int, float, int]:
            value = trial.value if trial.value is not None else math.inf * sign
            return _ORDER.index(trial.status), sign * value, trial.number

        return sorted(self.study.trials(), key=key)


def open_sweep(file: SearchFile, recipe: str, overrides: Sequence[str], out: str | None) -> Sweep:
    """Check a search and its recipe, and create or open the study in the directory of the sweep.

    Args:
        out: the directory of the sweep. Default: run_dir of the recipe.

    Raises:
        RecipeError: the search or the recipe is wrong, or is not that of the trials in the directory.
        DataError: the data of the recipe cannot be read.
    """
    search, (loaded, given) = file.search, check_search(file, recipe, overrides)
    folder = Path(out or loaded.recipe.run_dir)
    study = Study(folder, search, larger_is_better=loaded.recipe.eval.larger_is_better)
    sweep = Sweep(recipe, tuple(given), loaded, search, folder, study)
    known = study.remember(_facts(loaded, search))
    if differences := list(_differences(known, _facts(loaded, search))):
        raise RecipeError(
            "\n".join([f"{folder}: its trials belong to another recipe or search:", *differences])
            + "\nRestore these values, or choose another directory with --out. More trials may be asked for."
        )
    begun = len(study.trials())
    if begun > search.count:
        raise RecipeError(f"{file.path}: trials: {begun} trials exist in {folder}, so {search.count} are too few")
    return sweep


def _facts(loaded: Loaded, search: Search) -> dict[str, Any]:
    """What must not change while a sweep is continued."""
    recipe = {key: value for key, value in public_values(loaded).items() if key != "run_dir"}
    return {
        "recipe": {dotted(path): value for path, value in leaves(recipe)},
        "search": search.model_dump(mode="json", exclude={"trials"}, exclude_defaults=True),
        "data": input_fingerprint(loaded),
    }


def _differences(known: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for part in ("search", "recipe"):
        before, after = ({dotted(path): value for path, value in leaves(each[part])} for each in (known, now))
        for key in dict.fromkeys([*before, *after]):
            if before.get(key) != after.get(key):
                yield f"  {part}: {key}: was {json.dumps(before.get(key))}, is {json.dumps(after.get(key))}"
    if known["data"] != now["data"]:
        yield "  the contents of the data or tokenizer files"


def run_sweep(sweep: Sweep, executor: LocalExecutor, options: Sequence[str], *, workers: int = 1) -> int:
    """Run the trials that are missing, `workers` at a time, and return the exit code.

    75 if the sweep was stopped; that of a trial which was refused or whose machine failed. The same call continues.

    Args:
        options: options of `ptft train` for every trial.

    Raises:
        PtftError: a trial cannot be started. The others are stopped first.
    """
    with ThreadPoolExecutor(workers) as pool:
        shares = [_share(worker, workers) for worker in range(workers)]
        futures = [pool.submit(_Worker(sweep, executor, options, share)) for share in shares]
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        if any(future.exception() for future in done):
            executor.stop()
    codes = [future.result() for future in futures]
    return next((code for code in codes if code not in (EXIT_FINISHED, EXIT_STOPPED)), max(codes))


def _share(worker: int, workers: int) -> dict[str, str]:
    """Environment variables that give a worker its part of the GPUs and cores of this machine."""
    if workers == 1:
        return {}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // workers))}
    gpus = _gpus()
    if gpus:
        share["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[worker::workers] or [gpus[worker % len(gpus)]])
    return share


def _gpus() -> list[str]:
    """The GPUs that this process may use, as in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [each for each in visible.split(",") if each.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, _ in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


@dataclass
class _Worker:
    """Takes one trial after the other, until there is none left or the sweep has to end."""

    sweep: Sweep
    executor: LocalExecutor
    options: Sequence[str]
    variables: Mapping[str, str]

    def __call__(self) -> int:
        while not self.executor.stop_requested:
            claim = self.sweep.study.claim()
            if claim is None:
                return EXIT_FINISHED
            try:
                code = _Attempt(self, claim, self.sweep.run(claim.trial)).make()
            finally:
                claim.lock.release()
            if code in ENDS_THE_SWEEP:
                self.executor.stop()
                return code
        return EXIT_STOPPED


class _Attempt:
    """One start of a trial: trains it, judges its evaluations meanwhile, and records its end."""

    def __init__(self, worker: _Worker, claim: Claim, run: Run) -> None:
        self.worker, self.study, self.number, self.run = worker, worker.sweep.study, claim.trial.number, run
        self.evaluations = Evaluations(run.run_dir / "metrics.jsonl", worker.sweep.metric)
        self.judged = 0
        self.pruned = claim.trial.pruned
        self.told = False

    def make(self) -> int:
        """The exit code: 0 if the trial has ended in any way, else one of ENDS_THE_SWEEP."""
        run = self.run
        try:
            run.load()
        except RecipeError as error:
            raise RecipeError(f"{run.name}: {error}") from None
        self.watch()
        code = self._train()
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
            say(f"{run.name} ended with exit code {code}. The same command continues with it.")
            return code
        else:
            self._end("failed", None, self.evaluations.last_step, code)
        return EXIT_FINISHED

    def _train(self) -> int:
        """The exit code of the run. Waits for a process of an earlier sweep that was killed while its trial went on."""
        executor, waits = self.worker.executor, False
        while not executor.stop_requested:
            if not _is_locked(self.run.run_dir):
                if self.pruned is not None or is_finished(self.run):
                    return EXIT_FINISHED
                code = executor(self.run, self.worker.options, watch=self.watch, variables=self.worker.variables)
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
        text = _why(code, self.evaluations.metric) if value is None else f"{self.evaluations.metric} {plain(value)}"
        say(f"{self.run.name}: {status} after update {updates}, {text}")


def _why(exit_code: int | None, metric: str) -> str:
    """The cause of a failure."""
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


def finish(sweep: Sweep) -> int:
    """Write the table and the best recipe, print both, and return the exit code.

    Nothing is written while trials of other commands are running; the last command does it.

    Raises:
        PtftError: all trials have failed.
    """
    trials = sweep.sorted_trials()
    running = sum(trial.status == "unfinished" for trial in trials)
    if running or len(trials) < sweep.search.count:
        say(f"{running} trials still run in other commands; the last one writes {sweep.folder / TABLE}")
        return EXIT_FINISHED
    best = trials[0] if trials[0].status == "finished" else None
    recipe = sweep.loaded.recipe
    values = {
        "method": sweep.search.method,
        "seed": sweep.search.seed,
        "metric": sweep.metric,
        "goal": "max" if recipe.eval.larger_is_better else "min",
        "best": None if best is None else best.number,
        "trials": [_row(trial) for trial in trials],
    }
    _replace(sweep.folder / TABLE, json.dumps(values, indent=1) + "\n")
    for line in table(sweep, trials):
        say(line)
    if best is None:
        codes = ", ".join(sorted({str(trial.exit_code) for trial in trials}))
        raise PtftError(f"{sweep.folder}: no trial has finished (exit codes: {codes}); see the logs of the trials")
    _replace(sweep.folder / BEST, best_recipe(sweep, best))
    say(f"table        {sweep.folder / TABLE}")
    say(f"best recipe  {sweep.folder / BEST}   (ptft train {sweep.folder / BEST})")
    say(f"next         ptft compare {sweep.folder}/trial-*")
    return EXIT_FINISHED


def _row(trial: Trial) -> dict[str, Any]:
    return {
        "trial": trial.number,
        "directory": trial.name,
        "parameters": trial.parameters,
        "value": trial.value,
        "updates": trial.updates,
        "status": trial.status,
        "exit_code": trial.exit_code,
    }


def table(sweep: Sweep, trials: Sequence[Trial]) -> Iterator[str]:
    """Aligned lines: trial, parameters, value, updates, status."""
    keys = list(sweep.search.search)
    rows = [["trial", *keys, sweep.metric, "updates", "status"]]
    for trial in trials:
        shown = [_shown(trial.parameters[key]) for key in keys]
        failed = trial.status == "failed"
        status = f"failed ({_why(trial.exit_code, sweep.metric)})" if failed else trial.status
        value = "-" if trial.value is None else _shown(trial.value)
        rows.append([trial.name, *shown, value, str(trial.updates), status])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def best_recipe(sweep: Sweep, best: Trial) -> str:
    """The recipe of the best trial as text, for a new run in SWEEP_DIR/best. Comments of the recipe are kept."""
    run = sweep.run(best)
    run = Run(run.name, run.recipe, run.overrides, sweep.folder / "best")
    value = f"{sweep.metric} {plain(best.value)}"
    first = f"# The best of {sweep.search.count} trials: {best.name}, {value}. {starts_at(sweep.loaded)}\n"
    text = first + edited(sweep.loaded.text, run.words[1:])
    return text if _means(text, run, sweep.folder) else first + to_yaml(public_values(run.load()))


def _means(text: str, run: Run, folder: Path) -> bool:
    """Whether the text is that of this run's recipe. An edited value may lie in an anchor that others refer to."""
    probe = folder / f".best-{os.getpid()}.yaml"
    probe.write_text(text, encoding="utf-8")
    try:
        return load_recipe(probe).recipe == run.load().recipe
    except RecipeError:
        return False
    finally:
        probe.unlink()


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
