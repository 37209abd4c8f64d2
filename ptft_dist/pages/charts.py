"""The curves of runs as data for the plots of a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ptft_dist.pages.read import EVAL, RunFiles

POINTS = 2000
"""Maximum number of points of a curve. Longer ones keep the least and the greatest value of each part."""
_NOT_DRAWN = {"step", "phase", "tokens", "loss_tokens", "time_s", "eval/time_s", "skipped"}
_OPTIMIZER, _THROUGHPUT = ("lr", "grad_norm"), ("tokens_per_s", "samples_per_s", "mfu", "memory_bytes")
_TITLES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
    "samples_per_s": "samples per second",
    "mfu": "MFU (model FLOPs utilization)",
    "memory_bytes": "peak memory (GB)",
    "generation_s": "time of generation (s)",
    "scoring_s": "time of scoring (s)",
}


@dataclass(frozen=True)
class Chart:
    """One plot: every curve of one quantity."""

    title: str
    section: str
    curves: list[dict[str, Any]]
    """Each: run (its index), side (train or eval), step, tokens and y, lists of equal length."""


def charts(runs: Sequence[RunFiles]) -> list[Chart]:
    """The plots of these runs: the loss first, then metrics, optimizer, and throughput."""
    curves = [_curves(run) for run in runs]
    keys = dict.fromkeys(key for each in curves for key in each)
    names = list(dict.fromkeys(key.removeprefix(EVAL) for key in keys))
    result = []
    for name in sorted(names, key=lambda name: (_rank(name, keys), names.index(name))):
        drawn = [
            {"run": i, "side": side, **curve}
            for i, each in enumerate(curves)
            for side, key in (("train", name), ("eval", EVAL + name))
            if (curve := each.get(key)) is not None
        ]
        result.append(Chart(_TITLES.get(name, name), _SECTIONS[_rank(name, keys)], drawn))
    return result


_SECTIONS = ("Loss", "Evaluation", "Training", "Optimizer", "Throughput")


def _rank(name: str, keys: dict[str, None]) -> int:
    """The section of a quantity, as an index of _SECTIONS."""
    if name == "loss":
        return 0
    if name in _OPTIMIZER:
        return 3
    if name in _THROUGHPUT or name.endswith("_s"):
        return 4
    return 1 if EVAL + name in keys else 2


def _curves(run: RunFiles) -> dict[str, dict[str, list[float]]]:
    """step, tokens and y of each quantity, by its key in metrics.jsonl."""
    points: dict[str, tuple[list[float], list[float]]] = {}
    for row in run.rows:
        for key, value in row.items():
            if key in _NOT_DRAWN or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            steps, values = points.setdefault(key, ([], []))
            steps.append(row["step"])
            values.append(value / 1e9 if key == "memory_bytes" else value)
    trained = [(row["step"], row["tokens"]) for row in run.rows if "tokens" in row]
    known = np.array([(0, 0), *trained], dtype=float).T
    return {key: _thinned(np.array(steps), np.array(values), known) for key, (steps, values) in points.items()}


def _thinned(steps: np.ndarray, values: np.ndarray, known: np.ndarray) -> dict[str, list[float]]:
    """known: updates and their tokens [2, K]; in between, tokens are interpolated."""
    kept = np.arange(len(steps))
    if len(steps) > POINTS:
        edges = np.linspace(0, len(steps), POINTS // 2 + 1).astype(int)
        parts = [(a, values[a:b]) for a, b in pairwise(edges)]
        kept = np.unique([a + at for a, part in parts for at in (part.argmin(), part.argmax())])
    return {
        "step": steps[kept].tolist(),
        "tokens": np.interp(steps[kept], *known).round().astype(int).tolist(),
        "y": [float(f"{value:.6g}") for value in values[kept].tolist()],
    }
