"""The progress of a run: what a checkpoint stores in addition to weights, optimizer and batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ptft_dist.config.recipe import is_better


@dataclass(frozen=True)
class Judge:
    """The metric, its goal and the validation rows. Evaluations with equal judges are comparable."""

    metric: str
    larger_is_better: bool
    rows: str
    """Identifies the validation rows."""

    def is_better(self, value: float, than: float) -> bool:
        return is_better(value, than, larger_is_better=self.larger_is_better)


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, according to `judge`."""

    judge: Judge
    step: int
    value: float
    metrics: dict[str, float]
    """All metrics of that evaluation."""


@dataclass
class RunProgress:
    """The state of the loop at a phase boundary."""

    step: int = 0
    tokens: int = 0
    evaluated_step: int = -1
    """The last update that was evaluated; -1: none yet."""
    first_metrics: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of the last evaluation."""
    best: Best | None = None
    """The best evaluation; used by early stopping and the report."""
    best_checkpoint: Best | None = None
    """The best evaluation whose weights are in a committed checkpoint; used by retention and export."""
    worse_evaluations: int = 0
    """Number of consecutive evaluations without a new best."""

    def judge(self, judge: Judge, metrics: Mapping[str, float], value: float) -> bool:
        """Record an evaluation after update `step`; return whether it is the best so far.

        An evaluation before the first update is never the best, because no checkpoint contains its weights.
        """
        if self.step == 0:
            return False
        if self.best is not None and not judge.is_better(value, self.best.value):
            self.worse_evaluations += 1
            return False
        self.best = Best(judge, self.step, value, dict(metrics))
        self.worse_evaluations = 0
        return True

    def forget_incomparable(self, judge: Judge) -> Best | None:
        """Drop the best evaluation if it has another metric, goal or validation rows, and return it."""
        found = (best for best in (self.best, self.best_checkpoint) if best and best.judge != judge)
        return self._forget(next(found, None))

    def forget_best_checkpoint(self) -> Best | None:
        """Drop the best evaluation if its weights are in a checkpoint, and return it."""
        return self._forget(self.best_checkpoint)

    def _forget(self, dropped: Best | None) -> Best | None:
        """Drop the best evaluation. This update then counts as not evaluated yet, so that it can be the next best."""
        if dropped is not None:
            self.best = self.best_checkpoint = None
            self.worse_evaluations = 0
            self.evaluated_step = min(self.evaluated_step, self.step - 1)
        return dropped

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunProgress:
        """Read from a manifest. The best evaluation of an old manifest without a judge is dropped."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in ("best", "best_checkpoint"):
            best = known.get(name)
            known[name] = Best(**{**best, "judge": Judge(**best["judge"])}) if isinstance(best, dict) else None
        if known["best"] is None:
            known["worse_evaluations"] = 0
        return cls(**known)
