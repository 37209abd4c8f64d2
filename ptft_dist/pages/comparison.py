"""What differs between runs: metrics, recipes, environments, and evaluations on the same examples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ptft_dist.config.recipe import goal_of
from ptft_dist.pages.evaluation import OLDER, Evaluation, Interval, Tested, paired, why_no_intervals, why_not_paired
from ptft_dist.pages.read import RunFiles
from ptft_dist.pages.tables import Cell, Table, cells, number
from ptft_dist.reporting.messages import clock

Goal = Literal["min", "max"]
ABSENT = "-"
_DESCRIPTIVE = ("kl", "response_tokens", "without_eos", "accuracy_longer", "accuracy_shorter")
_DESCRIPTIVE_PARTS = ("_mean", "_std", "reward_p", "rewards/", "logps/")
_DECIDES_ROWS = ("task", "data.", "tokenizer.", "eval.max_rows")
_ENVIRONMENT = ("device", "kind", "world_size", "python", "platform", "ptft_dist", "packages")


@dataclass(frozen=True)
class FinalMetric:
    """A metric of one run. update: the one at which it was measured."""

    final: float
    update: int
    best: float
    best_update: int


@dataclass(frozen=True)
class Comparison:
    """Two runs or more. The first one is the baseline of differences."""

    runs: list[RunFiles]

    @cached_property
    def metrics(self) -> dict[str, list[FinalMetric | None]]:
        """For each metric: that of each run, None where it has no such metric."""
        names = dict.fromkeys(name for run in self.runs for _, metrics in run.evaluations for name in metrics)
        return {name: [_final(run, name, self.goal(name) or goal_of(name)) for run in self.runs] for name in names}

    def goal(self, metric: str) -> Goal | None:
        """Whether a metric is to be minimized or maximized; None if it only describes, such as a length, or
        is the loss of different tasks."""
        for run in self.runs:
            if run.values.get("eval.metric") == metric and run.values.get("eval.goal"):
                return "max" if run.values["eval.goal"] == "max" else "min"
        if metric in _DESCRIPTIVE or any(part in metric for part in _DESCRIPTIVE_PARTS):
            return None
        if metric.endswith("loss") and len({run.values.get("task") for run in self.runs}) > 1:
            return None
        return goal_of(metric)

    @cached_property
    def recipe_differences(self) -> dict[str, list[Any]]:
        """The dotted keys of the recipes whose values differ, without run_dir; ABSENT where a run has no such key."""
        return _differences([{k: v for k, v in run.values.items() if k != "run_dir"} for run in self.runs])

    @cached_property
    def environment_differences(self) -> dict[str, list[Any]]:
        return _differences([environment_values(run) for run in self.runs])

    @cached_property
    def other_rows(self) -> str | None:
        """Why metrics may not be comparable: the keys that decide which rows are evaluated."""
        keys = [key for key in self.recipe_differences if key.startswith(_DECIDES_ROWS)]
        if not keys and len({run.environment.get("inputs") for run in self.runs}) > 1:
            keys = ["contents of the data or tokenizer files"]
        if not keys:
            return None
        shown = ", ".join(keys[:5]) + (" ..." if len(keys) > 5 else "")
        return f"The runs may have been evaluated on different rows or tokens, since they differ in: {shown}"

    @cached_property
    def intervals(self) -> list[dict[str, Interval]]:
        """The metrics of `ptft evaluate` with confidence intervals, for each run."""
        return [run.evaluation.intervals() if run.evaluation is not None else {} for run in self.runs]

    @cached_property
    def tests(self) -> list[dict[str, Tested] | str]:
        """Each run but the first against the first one, by metric; or why there is no test."""
        return [_tested(self.runs[0], run) for run in self.runs[1:]]

    def values(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        names = [run.name for run in self.runs]
        return {
            "runs": [
                {"name": r.name, "path": str(r.path), "status": r.status, "updates": r.updates, "tokens": r.tokens}
                for r in self.runs
            ],
            "metrics": {
                name: {
                    "goal": self.goal(name),
                    "runs": {
                        n: None if each is None else _finite(vars(each)) for n, each in zip(names, found, strict=True)
                    },
                }
                for name, found in self.metrics.items()
            },
            "recipe": {k: dict(zip(names, v, strict=True)) for k, v in self.recipe_differences.items()},
            "environment": {k: dict(zip(names, v, strict=True)) for k, v in self.environment_differences.items()},
            "intervals": {
                n: {k: i._asdict() for k, i in each.items()} for n, each in zip(names, self.intervals, strict=True)
            },
            "tests": {
                name: found
                if isinstance(found, str)
                else {key: {**t.difference._asdict(), "p": t.p} for key, t in found.items()}
                for name, found in zip(names[1:], self.tests, strict=True)
            },
        }

    def tables(self) -> list[Table]:
        """The comparison for people."""
        tables = [self._runs_table(), self._metrics_table(), self._evaluations_table()]
        tables.append(_differences_table("Recipes: keys that differ", self.runs, self.recipe_differences))
        if self.environment_differences:
            tables.append(_differences_table("Environments: what differs", self.runs, self.environment_differences))
        return tables

    def _runs_table(self) -> Table:
        header = ["run", "status", "updates", "tokens", "time of last start", "tokens/s"]
        rows = []
        for run in self.runs:
            time_s, speed = run.result.get("wall_s"), run.result.get("tokens_per_s")
            shown = (ABSENT if time_s is None else clock(time_s), ABSENT if speed is None else f"{speed:,.0f}")
            rows.append(cells(run.name, run.status, number(run.updates), number(run.tokens), *shown))
        return Table("Runs", header, rows)

    def _metrics_table(self) -> Table:
        rows = []
        for name, found in self.metrics.items():
            goal = self.goal(name)
            finals, bests = ([getattr(f, of) if f else None for f in found] for of in ("final", "best"))
            rows.append(_marked(f"{name} {_arrow(goal)}".strip(), finals, goal))
            if goal is not None and finals != bests:
                texts = [None if f is None else f"{number(f.best)} (update {f.best_update:,})" for f in found]
                rows.append(_marked(f"{name}, best evaluation", bests, goal, texts))
        notes = [] if rows else ["No run has been evaluated: data.validation is not set, or no evaluation was due yet."]
        notes += [self.other_rows] if rows and self.other_rows else []
        unfinished = [run.name for run in self.runs if run.status != "finished"]
        notes += [f"Not finished: {', '.join(unfinished)}"] if unfinished else []
        return Table("Metrics", ["metric", *(run.name for run in self.runs)], rows, notes)

    def _evaluations_table(self) -> Table:
        """Intervals and paired tests."""
        names = dict.fromkeys(name for each in self.intervals for name in each)
        names |= dict.fromkeys(name for run in self.runs if run.evaluation for name in run.evaluation.metrics)
        header = ["metric", self.runs[0].name]
        for run in self.runs[1:]:
            header += [run.name, "difference", "p"]
        rows = [[Cell(name), *self._evaluated(name)] for name in names]
        why = [(run.name, why_no_intervals(run.evaluation, run.path)) for run in self.runs]
        notes = [f"{name}: {reason}" for name, reason in why if reason]
        notes += [
            f"{run.name}: {OLDER.format(run.path)}" for run in self.runs if run.evaluation and run.evaluation.older
        ]
        named = {name for name, reason in why if reason}
        notes += [
            f"{run.name}: no test, {found}"
            for run, found in zip(self.runs[1:], self.tests, strict=True)
            if isinstance(found, str) and not {run.name, self.runs[0].name} & named
        ]
        if any(isinstance(found, dict) for found in self.tests):
            notes.append(
                "Differences are from the first run. p: two-sided paired permutation test over examples, not corrected "
                "for the number of tests."
            )
        return Table("Evaluation: value [95 % confidence interval over examples]", header, rows, notes)

    def _evaluated(self, name: str) -> list[Cell]:
        values = [
            evaluated_text(run.evaluation, each, name) for run, each in zip(self.runs, self.intervals, strict=True)
        ]
        row = cells(values[0])
        for value, found in zip(values[1:], self.tests, strict=True):
            test = found.get(name) if isinstance(found, dict) else None
            row += cells(value, *((_interval(test.difference, "+"), f"{test.p:.2g}") if test else (ABSENT, ABSENT)))
        return row


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _differences_table(title: str, runs: Sequence[RunFiles], found: dict[str, list[Any]]) -> Table:
    rows = [cells(key, *map(_shown, values)) for key, values in found.items()]
    return Table(title, ["key", *(run.name for run in runs)], rows, [] if rows else ["None."])


def environment_values(run: RunFiles) -> dict[str, Any]:
    """What may change the numbers or the speed of a run: device, processes and versions."""
    values = {key: run.environment.get(key) for key in _ENVIRONMENT}
    return {k: v for k, v in values.items() if k != "packages"} | dict(values["packages"] or {})


def _differences(each: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for values in each for key in values)
    found = {key: [values.get(key, ABSENT) for values in each] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def _final(run: RunFiles, name: str, goal: Goal) -> FinalMetric | None:
    update, final = run.final
    if name not in final:
        return None
    trained = [each for each in run.evaluations if each[0] > 0]  # as `Best`, without the untrained network
    measured = [(m[name], step) for step, m in trained if math.isfinite(m.get(name, math.nan))]
    best, best_update = (min if goal == "min" else max)(
        measured, key=lambda pair: pair[0], default=(final[name], update)
    )
    return FinalMetric(final[name], update, best, best_update)


def _marked(
    name: str, values: Sequence[float | None], goal: Goal | None, texts: Sequence[str | None] | None = None
) -> list[Cell]:
    """A row in which the best value is marked, if not all are equal."""
    known = {value for value in values if value is not None and math.isfinite(value)}
    best = None if goal is None or len(known) < 2 else (min if goal == "min" else max)(known)
    shown = texts or [None if value is None else number(value) for value in values]
    return [Cell(name), *(Cell(t or ABSENT, v is not None and v == best) for t, v in zip(shown, values, strict=True))]


def _arrow(goal: Goal | None) -> str:
    return {"min": "(lower is better)", "max": "(higher is better)", None: ""}[goal]


def _tested(first: RunFiles, run: RunFiles) -> dict[str, Tested] | str:
    for each in (first, run):
        if reason := why_no_intervals(each.evaluation, each.path):
            return f"{each.name} has {reason}"
    assert first.evaluation is not None
    assert run.evaluation is not None
    return why_not_paired(first.evaluation, run.evaluation) or paired(first.evaluation, run.evaluation)


def evaluated_text(evaluation: Evaluation | None, intervals: Mapping[str, Interval], name: str) -> str:
    """A metric of `ptft evaluate`, with its interval if it has one."""
    if name in intervals:
        return _interval(intervals[name])
    return number(evaluation.metrics[name]) if evaluation is not None and name in evaluation.metrics else ABSENT


def _interval(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.4g} [{interval.low:{sign}.4g}, {interval.high:{sign}.4g}]"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
