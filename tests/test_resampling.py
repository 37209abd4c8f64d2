"""Confidence intervals and paired tests, against scipy.stats and naive loops."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from scipy import stats

from ptft_dist.pages.resampling import bootstrap_sums, percentile_interval, ratio, sign_flip_p

MANY = 20_000


def judged(count: int, seed: int, shift: float = 0.0) -> np.ndarray:
    """A sum of 1 for each example, with counts of one: a mean [N, 2]."""
    values = np.random.default_rng(seed).gamma(2.0, 1.0, count) + shift
    return np.stack([values, np.ones(count)], axis=1)


def token_losses(count: int, seed: int) -> np.ndarray:
    """The summed loss and number of tokens of each example [N, 2]."""
    chance = np.random.default_rng(seed)
    tokens = chance.integers(1, 40, count)
    return np.stack([tokens * chance.gamma(3.0, 1.0, count), tokens], axis=1)


def gap(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    return second.mean(axis) - first.mean(axis)


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    values = judged(80, seed=0)
    low, high = percentile_interval(ratio(bootstrap_sums(values, MANY)))
    theirs = stats.bootstrap((values[:, 0],), np.mean, n_resamples=MANY, method="percentile", rng=1).confidence_interval
    spread = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.02 * spread)
    assert high == pytest.approx(theirs.high, abs=0.02 * spread)


def test_the_interval_of_a_paired_difference_is_that_of_scipy() -> None:
    first = judged(80, seed=0)
    second = first * [0.9, 1.0] + judged(80, seed=3) * [0.3, 0.0]
    sums = ratio(bootstrap_sums(np.stack([first, second], axis=1), MANY))
    low, high = percentile_interval(sums[:, 1] - sums[:, 0])
    samples = (first[:, 0], second[:, 0])
    found = stats.bootstrap(samples, gap, paired=True, vectorized=True, n_resamples=MANY, method="percentile", rng=1)
    theirs = found.confidence_interval
    spread = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=0.02 * spread)
    assert high == pytest.approx(theirs.high, abs=0.02 * spread)


def test_resampled_sums_are_those_of_a_loop() -> None:
    """Whole examples are drawn, with all of their tokens."""
    values, chance = token_losses(7, seed=2), np.random.default_rng(5)
    found = bootstrap_sums(values, resamples=6, seed=5)
    for sums in found:
        drawn = [values[i] for i in chance.integers(7, size=7)]
        assert sums.tolist() == pytest.approx([sum(pair[0] for pair in drawn), sum(pair[1] for pair in drawn)])


def test_an_exact_p_value_is_that_of_scipy() -> None:
    first, second = judged(9, seed=0), judged(9, seed=1, shift=0.7)
    samples = (first[:, 0], second[:, 0])
    theirs = stats.permutation_test(samples, gap, permutation_type="samples", vectorized=True, n_resamples=np.inf)
    assert sign_flip_p(first, second) == pytest.approx(theirs.pvalue)


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5])
def test_a_sampled_p_value_is_that_of_scipy(shift: float) -> None:
    first, second = judged(100, seed=0), judged(100, seed=1, shift=shift)
    samples = (first[:, 0], second[:, 0])
    theirs = stats.permutation_test(samples, gap, permutation_type="samples", vectorized=True, n_resamples=MANY, rng=1)
    assert sign_flip_p(first, second, MANY) == pytest.approx(theirs.pvalue, abs=0.012)


def test_permutations_swap_sums_with_their_counts() -> None:
    """With other token counts of the same examples, as after another tokenizer."""
    first, second = token_losses(6, seed=0), token_losses(6, seed=1)

    def difference(swapped: tuple[bool, ...]) -> float:
        ours = [b if swap else a for a, b, swap in zip(first.tolist(), second.tolist(), swapped, strict=True)]
        theirs = [a if swap else b for a, b, swap in zip(first.tolist(), second.tolist(), swapped, strict=True)]
        loss = [sum(pair[0] for pair in side) / sum(pair[1] for pair in side) for side in (ours, theirs)]
        return abs(loss[1] - loss[0])

    every = [difference(swapped) for swapped in itertools.product([False, True], repeat=6)]
    assert sign_flip_p(first, second) == pytest.approx(sum(d >= every[0] - 1e-12 for d in every) / 64)


def test_equal_runs_do_not_differ() -> None:
    values = judged(50, seed=0)
    assert sign_flip_p(values, values) == 1.0
    sums = ratio(bootstrap_sums(np.stack([values, values], axis=1), 100))
    assert percentile_interval(sums[:, 1] - sums[:, 0]) == (0.0, 0.0)


def test_intervals_cover_the_truth() -> None:
    """The mean of Bernoulli variables of 0.3: the 95 % interval holds it in about 95 % of 200 samples."""
    chance, covered = random.Random(0), 0
    for seed in range(200):
        values = np.array([[float(chance.random() < 0.3), 1.0] for _ in range(150)])
        low, high = percentile_interval(ratio(bootstrap_sums(values, 400, seed)))
        covered += low <= 0.3 <= high
    assert 180 <= covered <= 198


def test_resamples_without_a_count_are_left_out() -> None:
    """Two of three examples have no such metric, so some resamples draw none that has."""
    values = np.array([[2.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    resampled = ratio(bootstrap_sums(values, 200))
    assert np.isnan(resampled).any()
    assert percentile_interval(resampled) == (2.0, 2.0)
