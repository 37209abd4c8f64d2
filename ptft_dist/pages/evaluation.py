"""The files of `ptft evaluate` in a run directory, and what they say beyond a number: intervals and paired tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ptft_dist.errors import DataError
from ptft_dist.launch.result import RESULT
from ptft_dist.pages.resampling import bootstrap_sums, percentile_interval, ratio, sign_flip_p

EVALUATION, EXAMPLES = "evaluation.json", "evaluation.rows.jsonl"
OLDER = "evaluation.json is older than the last training of this run; evaluate its model again: ptft evaluate {}"
_OLDER_S = 60
"""Copies of a directory may change the order of its files' times by seconds."""


class Interval(NamedTuple):
    """A metric, or a difference of metrics, with its 95 % confidence interval over examples."""

    value: float
    low: float
    high: float


class Tested(NamedTuple):
    """The difference of a metric from that of the first run, and the p-value of the paired test."""

    difference: Interval
    p: float


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json and evaluation.rows.jsonl."""

    metrics: dict[str, float]
    """By name without `eval/`."""
    rows: int
    """Number of examples."""
    judged: str | None
    """Identifies the examples, independently of model and tokenizer."""
    ids: list[str] = field(repr=False)
    """The hash of each example; empty without evaluation.rows.jsonl."""
    values: dict[str, np.ndarray] = field(repr=False)
    """Sum and count of each example [N, 2], by metric without `eval/`."""
    older: bool
    """Whether the run has ended a start after it, so that it may be of other weights."""

    def intervals(self) -> dict[str, Interval]:
        """The metrics that are sums over examples, with their intervals."""
        names = [name for name, values in self.values.items() if values[:, 1].sum() > 0]
        if not names:
            return {}
        resampled = ratio(bootstrap_sums(_stacked(self, names)))
        return {
            name: Interval(float(ratio(self.values[name].sum(0))), *percentile_interval(resampled[:, i]))
            for i, name in enumerate(names)
        }


def _stacked(evaluation: Evaluation, names: Sequence[str]) -> np.ndarray:
    """The values of several metrics [N, M, 2]."""
    return np.stack([evaluation.values[name] for name in names], axis=1)


def paired(first: Evaluation, second: Evaluation) -> dict[str, Tested]:
    """second - first for each metric that both have, over the same examples. See `why_not_paired`.

    Losses per token are left out if an example has other numbers of tokens in them: the tokenizers differ.
    """
    names = [n for n in first.values if n in second.values and _comparable(n, first.values[n], second.values[n])]
    if not names:
        return {}
    both = np.stack([_stacked(first, names), _stacked(second, names)], axis=1)  # [N, 2, M, 2]
    value, resampled = ratio(both.sum(0)), ratio(bootstrap_sums(both))
    return {
        name: Tested(
            Interval(float(value[1, i] - value[0, i]), *percentile_interval(resampled[:, 1, i] - resampled[:, 0, i])),
            sign_flip_p(first.values[name], second.values[name]),
        )
        for i, name in enumerate(names)
    }


def _comparable(name: str, first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two runs' sums and counts [N, 2] of a metric may be subtracted."""
    return bool(
        first[:, 1].sum() and second[:, 1].sum() and not (name.endswith("loss") and (first[:, 1] != second[:, 1]).any())
    )


def why_no_intervals(evaluation: Evaluation | None, run_dir: Path) -> str | None:
    """Why there are no confidence intervals, and the command that makes them; None if there are."""
    if evaluation is None:
        return f"no {EVALUATION}; run: ptft evaluate {run_dir}"
    if not evaluation.ids:
        return f"no {EXAMPLES}; run: ptft evaluate {run_dir}"
    return None


def why_not_paired(first: Evaluation, second: Evaluation) -> str | None:
    """Why two evaluations cannot be tested in pairs; None if they can. Both have examples."""
    if first.judged is None or first.judged != second.judged or first.ids != second.ids:
        return (
            "other examples than the first run; run for both: ptft evaluate RUN --data FILE --out RUN/evaluation.json"
        )
    return None


def read_evaluation(run_dir: Path) -> Evaluation | None:
    """Read what `ptft evaluate` has written; None if it has not run.

    Raises:
        DataError: a file is damaged, or the two files do not belong together.
    """
    path = run_dir / EVALUATION
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        metrics = {_short(name): float(value) for name, value in found["metrics"].items()}
        rows = int(found["examples"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: damaged ({error}); run again: ptft evaluate {run_dir}") from None
    examples = _read_examples(run_dir / EXAMPLES)
    if examples and len(examples) != rows:
        raise DataError(
            f"{run_dir / EXAMPLES}: {len(examples):,} examples, but {EVALUATION} has {rows:,}; "
            f"run again: ptft evaluate {run_dir}"
        )
    names = list(dict.fromkeys(name for example in examples for name in example["values"]))
    values = {_short(n): np.array([e["values"].get(n, (0, 0)) for e in examples], dtype=float) for n in names}
    result = run_dir / RESULT
    older = result.is_file() and result.stat().st_mtime > path.stat().st_mtime + _OLDER_S
    return Evaluation(metrics, rows, found.get("judged"), [str(each["id"]) for each in examples], values, older)


def _read_examples(path: Path) -> list[dict[str, Any]]:
    """The lines of evaluation.rows.jsonl; none if it is missing."""
    if not path.is_file():
        return []
    examples = []
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            example = json.loads(line)
            pairs = np.array([[*pair] for pair in example["values"].values()], dtype=float)
            valid = "id" in example and pairs.shape in ((0,), (len(pairs), 2)) and np.isfinite(pairs).all()
        except (ValueError, KeyError, TypeError, AttributeError):
            valid = False
        if not valid:
            raise DataError(
                f'{path}:{number}: not an example ("id" and "values": {{name: [sum, count]}}); '
                f"run again: ptft evaluate {path.parent}"
            )
        examples.append(example)
    return examples


def _short(name: str) -> str:
    return name.removeprefix("eval/")
