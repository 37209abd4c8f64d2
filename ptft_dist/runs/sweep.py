"""Sweeps: many runs of one recipe with different values, the table of their metrics, and the best recipe.

A trial is a `Run` in SWEEP_DIR/trial-0000, ...; study.py says which one is next. Several threads of one command, and
several commands on the same directory, take trials from the same study.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptft_dist.api import input_fingerprint, load_recipe, values_of_environment
from ptft_dist.config.document import leaves
from ptft_dist.config.load import Loaded, edited, public_values, starts_at, to_yaml
from ptft_dist.config.section import dotted
from ptft_dist.errors import EXIT_FINISHED, EXIT_STOPPED, PtftError, RecipeError
from ptft_dist.reporting.messages import plain, say
from ptft_dist.reporting.output import write_text
from ptft_dist.runs.attempt import ENDS_THE_SWEEP, Attempt, cause
from ptft_dist.runs.local import LocalExecutor
from ptft_dist.runs.run_list import Run, aligned
from ptft_dist.runs.search import Search, SearchFile, check_search, words
from ptft_dist.runs.study import Status, Study, Trial

TABLE, BEST = "sweep.json", "best.yaml"
NO_PAGE = "log.report=false"
"""Set in trials, unless the user sets it: a page has 5 MB. `ptft compare` has the curves of all."""
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
        return Run(name, self.recipe, (NO_PAGE, *self.values(trial)), self.folder / trial.name)

    def values(self, trial: Trial) -> tuple[str, ...]:
        """What a trial sets in the recipe."""
        return (*self.overrides, *words(trial.parameters))

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
        "recipe": {dotted(path): value for path, value in leaves(recipe)} | values_of_environment(loaded),
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
        futures = [pool.submit(_Worker(sweep, executor, options, share, alone=workers == 1)) for share in shares]
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
    alone: bool
    """Otherwise the output of the trials would be mixed. It goes to SWEEP_DIR/trial-0000/train.log and so on."""

    def __call__(self) -> int:
        while not self.executor.stop_requested:
            claim = self.sweep.study.claim()
            if claim is None:
                return EXIT_FINISHED
            try:
                run = self.sweep.run(claim.trial)
                log = None if self.alone else run.run_dir / "train.log"
                attempt = Attempt(self.sweep.study, claim.trial, run, self.sweep.metric, log=log)
                code = attempt.make(self.executor, self.options, self.variables)
            finally:
                claim.lock.release()
            if code in ENDS_THE_SWEEP:
                self.executor.stop()
                return code
        return EXIT_STOPPED


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
    write_text(sweep.folder / TABLE, json.dumps(values, indent=1) + "\n")
    for line in table(sweep, trials):
        say(line)
    if best is None:
        codes = ", ".join(sorted({str(trial.exit_code) for trial in trials}))
        raise PtftError(f"{sweep.folder}: no trial has finished (exit codes: {codes}); see the logs of the trials")
    write_text(sweep.folder / BEST, best_recipe(sweep, best))
    say(f"table        {sweep.folder / TABLE}")
    say(f"best recipe  {sweep.folder / BEST}   (ptft train {shlex.quote(str(sweep.folder / BEST))})")
    say(f"next         ptft compare {shlex.quote(str(sweep.folder))}/trial-*")
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
        status = f"failed ({cause(trial.exit_code, sweep.metric)})" if failed else trial.status
        value = "-" if trial.value is None else _shown(trial.value)
        rows.append([trial.name, *shown, value, str(trial.updates), status])
    return aligned(rows)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def best_recipe(sweep: Sweep, best: Trial) -> str:
    """The recipe of the best trial as text, for a new run in SWEEP_DIR/best. Comments of the recipe are kept."""
    run = Run(best.name, sweep.recipe, sweep.values(best), sweep.folder / "best")
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
