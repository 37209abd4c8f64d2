"""How far a run is: everything that a checkpoint must know beside weights, optimizer and batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Judge:
    """What makes evaluations comparable: the metric, whether a larger one is better, and the validation rows."""

    metric: str
    larger_is_better: bool
    rows: str
    """Identifies the validation rows that are scored."""

    def is_better(self, value: float, than: float) -> bool:
        return value > than if self.larger_is_better else value < than


@dataclass(frozen=True)
class Best:
    """The best evaluation so far, as judged by `judge`."""

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
    """The last update after which there was an evaluation; -1: none yet."""
    first_metrics: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the last evaluation."""
    best: Best | None = None
    """The best evaluation, for early stopping and the report."""
    best_checkpoint: Best | None = None
    """The best evaluation whose weights are in a committed checkpoint: what is kept and exported."""
    worse_evaluations: int = 0
    """Evaluations in a row without a new best."""

    def judge(self, judge: Judge, metrics: Mapping[str, float], value: float) -> bool:
        """Take note of an evaluation after update `step`; True if it is the best.

        Weights before the first update are no candidate: no checkpoint holds them.
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
        """Drop a best evaluation that was judged by another metric, goal or validation rows; the one dropped."""
        dropped = next((best for best in (self.best, self.best_checkpoint) if best and best.judge != judge), None)
        if dropped is not None:
            self.best = self.best_checkpoint = None
            self.worse_evaluations = 0
        return dropped

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunProgress:
        """From a manifest. One of format 1 does not say what its best evaluation was judged by, so it has none here."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        for name in ("best", "best_checkpoint"):
            best = known.get(name)
            known[name] = Best(**{**best, "judge": Judge(**best["judge"])}) if isinstance(best, dict) else None
        if known["best"] is None:
            known["worse_evaluations"] = 0
        return cls(**known)
