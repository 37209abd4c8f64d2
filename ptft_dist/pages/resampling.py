"""Confidence intervals and paired tests of metrics that are sums over examples, divided by sums over examples.

values: [N, 2] with the sum and the count of each of N examples. metric: sum of the sums / sum of the counts. With
counts of one this is the mean; with token counts, the mean over tokens, while whole examples are resampled.
"""

from __future__ import annotations

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
SEED = 0


def ratio(sums: np.ndarray) -> np.ndarray:
    """[..., 2] to [...]: sum / count, NaN where the count is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sums[..., 1] == 0, np.nan, sums[..., 0] / sums[..., 1])


def bootstrap_sums(values: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Column sums of examples drawn with replacement: [N, ...] to [resamples, ...]. Columns share the draws, so their
    differences are paired."""
    rng, count = np.random.default_rng(seed), len(values)
    flat = values.reshape(count, -1)
    sums = np.empty((resamples, flat.shape[1]))
    for i in range(resamples):
        sums[i] = np.bincount(rng.integers(count, size=count), minlength=count) @ flat
    return sums.reshape(resamples, *values.shape[1:])


def percentile_interval(resampled: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13). Undefined resamples are left out."""
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(resampled, [tail, 100 - tail])
    return float(low), float(high)


def sign_flip_p(first: np.ndarray, second: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> float:
    """The two-sided p-value of a paired permutation test of metric(second) - metric(first) = 0.

    Each permutation swaps the two runs' values of an example with probability 1/2. With at most `resamples` possible
    permutations all are used; otherwise the observed one counts as one of those drawn (Phipson and Smyth 2010).

    Args:
        first, second: the same examples, judged by two runs [N, 2].
    """
    count, totals, gap = len(first), (first.sum(0), second.sum(0)), second - first
    exact = count < 63 and 2**count <= resamples
    rng, draws = np.random.default_rng(seed), 2**count if exact else resamples
    moved = np.empty((draws, 2))
    for i in range(draws):
        swapped = (i >> np.arange(count)) & 1 if exact else rng.integers(2, size=count)
        moved[i] = swapped @ gap
    observed = float(abs(ratio(totals[1]) - ratio(totals[0])))
    permuted = np.abs(ratio(totals[1] - moved) - ratio(totals[0] + moved))
    extreme = int((permuted >= observed * (1 - 1e-9) - 1e-12).sum())  # equal but for rounding counts as equal
    return extreme / draws if exact else (extreme + 1) / (draws + 1)
