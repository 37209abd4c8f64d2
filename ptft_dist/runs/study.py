"""The trials of a sweep in a database of optuna, SWEEP_DIR/study.db: their values, evaluations and ends.

SQLite relies on file locks that are broken on some network file systems, and optuna advises against it for several
writers. Every access therefore holds the lock SWEEP_DIR/.study.lock, as run directories hold theirs.

The values of a trial are drawn once, from a generator seeded by (seed, number of the trial), and stored in the same
transaction that creates the trial. A sweep that was killed therefore draws what it would have drawn.
"""

from __future__ import annotations

import contextlib
import json
import math
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from ptft_dist.errors import RecipeError
from ptft_dist.runs.search import Range, Search

NAME = "ptft"
Status = Literal["unfinished", "finished", "pruned", "failed"]
_STATES: dict[Status, TrialState] = {
    "unfinished": TrialState.RUNNING,
    "finished": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


@dataclass(frozen=True)
class Trial:
    """What the study knows about a trial."""

    number: int
    parameters: dict[str, Any]
    """Key of the recipe -> value."""
    status: Status
    value: float | None
    """The metric of the model in its directory; for a pruned trial, that of the evaluation it was judged by."""
    updates: int
    exit_code: int | None
    """That of the run, if it failed."""
    pruned: tuple[int, float] | None
    """Update and value of the evaluation that the trial was judged by, if it is to be pruned."""

    @property
    def name(self) -> str:
        """The name of its directory."""
        return f"trial-{self.number:04d}"


@dataclass(frozen=True)
class Claim:
    """A trial that this process works on. No other one gets it until the claim is released or the process ends."""

    trial: Trial
    run_dir: Path
    lock: FileLock


class Study:
    """The study of a sweep, created if it does not exist. Threads and processes may use it at the same time."""

    def __init__(self, folder: Path, search: Search, *, larger_is_better: bool) -> None:
        """Raises RecipeError if the folder cannot be written."""
        self.folder, self.search = folder, search
        self.space = {key: _distribution(each) for key, each in search.search.items()}
        self.direction: Literal["maximize", "minimize"] = "maximize" if larger_is_better else "minimize"
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecipeError(f"run_dir: {folder} cannot be written: {error.strerror}") from None
        with self._locked():
            database = urllib.parse.quote(str(folder.absolute() / "study.db"))  # a path may have a % or a ?
            self.storage = optuna.storages.RDBStorage(f"sqlite:///{database}")
            self.study = optuna.create_study(
                storage=self.storage, study_name=NAME, direction=self.direction, load_if_exists=True
            )
            self.id = self.storage.get_study_id_from_name(NAME)

    def remember(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Store what the sweep is made of, unless it is stored already; return what is stored."""
        with self._locked():
            stored = self.storage.get_study_user_attrs(self.id)
            if "facts" not in stored:
                self.storage.set_study_user_attr(self.id, "facts", dict(facts))
                return dict(facts)
            return dict(stored["facts"])

    def trials(self) -> list[Trial]:
        """All trials by number."""
        with self._locked():
            return [self._read(each) for each in self.storage.get_all_trials(self.id)]

    def claim(self) -> Claim | None:
        """An unfinished trial that no process works on, or else a new one; None if there are enough."""
        with self._locked():
            frozen = self.storage.get_all_trials(self.id)
            for each in frozen:
                claim = None if each.state.is_finished() else self._try(self._read(each))
                if claim is not None:
                    return claim
            if len(frozen) >= self.search.count:
                return None
            template = optuna.create_trial(
                state=TrialState.RUNNING, params=self.draw(len(frozen), frozen), distributions=self.space
            )
            created = self.storage.get_trial(self.storage.create_new_trial(self.id, template))
            return self._try(self._read(created))

    def draw(self, number: int, earlier: list[FrozenTrial]) -> dict[str, Any]:
        """The values of a new trial, as the database has them.

        Args:
            earlier: the trials before it, from which tpe learns.
        """
        if self.search.method == "grid":
            values = self.search.combination(number)
            return {key: _stored(self.search.search[key], value) for key, value in values.items()}
        seed = int(np.random.SeedSequence([self.search.seed, number]).generate_state(1)[0])
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed)
        if self.search.method == "tpe":
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.search.startup or 10)
        # A copy in memory: asking the study itself would create a trial, and then set its values one by one.
        copy = optuna.create_study(direction=self.direction, sampler=sampler)
        copy.add_trials(earlier if self.search.method == "tpe" else [])
        return dict(copy.ask(self.space).params)

    def report(self, number: int, evaluation: int, step: int, value: float) -> bool:
        """Record the n-th evaluation of a trial, and return whether the trial is to be pruned. This is recorded too."""
        prune = self.search.prune
        assert prune is not None
        with self._locked():
            trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.id, number)
            if evaluation not in self.storage.get_trial(trial_id).intermediate_values:
                self.storage.set_trial_intermediate_value(trial_id, evaluation, value)
            trial = self.storage.get_trial(trial_id)
            if evaluation < max(prune.after, *trial.intermediate_values) or not self._pruner().prune(self.study, trial):
                return False
            self.storage.set_trial_user_attr(trial_id, "pruned", [step, value])
            return True

    def end(
        self, number: int, status: Status, value: float | None, *, updates: int, exit_code: int | None = None
    ) -> None:
        """Record the end of a trial."""
        with self._locked():
            trial_id = self.storage.get_trial_id_from_study_id_trial_number(self.id, number)
            self.storage.set_trial_user_attr(trial_id, "updates", updates)
            self.storage.set_trial_user_attr(trial_id, "exit_code", exit_code)
            values = None if value is None or not math.isfinite(value) else [value]
            self.storage.set_trial_state_values(trial_id, _STATES[status], values)

    def _pruner(self) -> optuna.pruners.BasePruner:
        prune = self.search.prune
        assert prune is not None
        if prune.method == "hyperband":
            return optuna.pruners.HyperbandPruner(min_resource=prune.after)
        return optuna.pruners.MedianPruner(n_startup_trials=prune.startup or 5)

    def _try(self, trial: Trial) -> Claim | None:
        run_dir = self.folder / trial.name
        run_dir.mkdir(exist_ok=True)
        lock = FileLock(run_dir / ".claim", thread_local=False)
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=0)
            return Claim(trial, run_dir, lock)
        return None

    def _read(self, frozen: FrozenTrial) -> Trial:
        status = next(name for name, state in _STATES.items() if state == frozen.state)
        attributes = frozen.user_attrs
        return Trial(
            number=frozen.number,
            parameters={key: _value(each, frozen.params[key]) for key, each in self.search.search.items()},
            status=status,
            value=frozen.values[0] if frozen.values else None,
            updates=attributes.get("updates", 0),
            exit_code=attributes.get("exit_code"),
            pruned=tuple(attributes["pruned"]) if "pruned" in attributes else None,
        )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with FileLock(self.folder / ".study.lock"):
            yield


def _distribution(each: Range) -> BaseDistribution:
    if each.choice is not None:
        return CategoricalDistribution([_stored(each, value) for value in each.choice])
    if each.int is not None:
        return IntDistribution(*each.int, step=each.step)
    low, high = each.log or each.uniform or (0.0, 0.0)
    return FloatDistribution(low, high, log=each.log is not None)


def _stored(each: Range, value: Any) -> Any:
    """A value as the database has it. Choices may be lists and sections, so they are JSON there."""
    return value if each.choice is None else json.dumps(value)


def _value(each: Range, stored: Any) -> Any:
    return stored if each.choice is None else json.loads(stored)
