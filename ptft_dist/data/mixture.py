"""data.mixing as a function of the position in the stream of rows: which source each position reads.

A run is divided into periods with constant weights. A period ends where the schedule says so, or where a source has
been read as often as max_epochs allows. Both follow from the numbers of rows, so the order does not depend on the
length of the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ptft_dist.config.data_section import MixingSection
from ptft_dist.data.order import Period

_CYCLE = 10_000
"""Positions after which a pattern of sources repeats, at most: weights are exact to 1 / 10,000."""


def periods_of(
    mixing: MixingSection, names: Sequence[str | None], rows: Sequence[int], global_size: int | None
) -> tuple[tuple[Period, ...], int | None]:
    """The periods of a run, and the number of positions until one has used up all of its sources (None: never).

    Args:
        names, rows: of each source.
        global_size: rows of each update, for a schedule.
    """
    table: list[tuple[int, list[float]]]
    if mixing.schedule is not None:
        assert global_size is not None
        table = [(period.from_step * global_size, _in_order(period.weights, names)) for period in mixing.schedule]
    elif mixing.weights is not None:
        table = [(0, _in_order(mixing.weights, names))]
    else:
        assert mixing.temperature is not None
        table = [(0, [count ** (1 / mixing.temperature) for count in rows])]
    most = None if mixing.max_epochs is None else [max(1, math.floor(mixing.max_epochs * count)) for count in rows]
    return limited(table, most)


def _in_order(weights: dict[str, float], names: Sequence[str | None]) -> list[float]:
    return [weights[str(name)] for name in names]


def limited(
    table: Sequence[tuple[int, Sequence[float]]], most: Sequence[int] | None
) -> tuple[tuple[Period, ...], int | None]:
    """Periods from a table (first position, weights), without sources that have been read `most` times.

    Args:
        most: the largest number of draws from each source; None: no limit.

    Returns:
        the periods, and the number of positions until nothing is left of the sources of a period, although a later
        period may have others; None: the last period has no end.
    """
    periods: list[Period] = []
    drawn = [0] * len(table[0][1])
    position = 0
    for number, (_, weights) in enumerate(table):
        end = table[number + 1][0] if number + 1 < len(table) else None
        while end is None or position < end:
            left = [0.0 if most and drawn[i] >= most[i] else weight for i, weight in enumerate(weights)]
            if not any(left):
                return tuple(periods), position
            period = Period(position, whole_weights(left))
            periods.append(period)
            cycle = period.cycle
            stop = end
            for i, weight in enumerate(period.weights):
                if most and weight:
                    used_up = position + _position_after(cycle, i, weight, most[i] - drawn[i])
                    stop = used_up if stop is None else min(stop, used_up)
            if stop is None:
                return tuple(periods), None
            laps, offset = divmod(stop - position, len(cycle))
            rest = np.bincount(cycle[:offset], minlength=len(drawn))
            drawn = [n + laps * w + int(r) for n, w, r in zip(drawn, period.weights, rest, strict=True)]
            position = stop
    return tuple(periods), None


def _position_after(cycle: np.ndarray, source: int, weight: int, draws: int) -> int:
    """The number of positions that contain this many draws from a source."""
    laps, rest = divmod(draws - 1, weight)
    return laps * len(cycle) + int(np.flatnonzero(cycle == source)[rest]) + 1


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers in the proportions of the weights, at least 1 for a weight above 0.

    Exact if the weights are fractions with small denominators, such as 0.7 and 0.3 or 3 and 1. Otherwise their sum is
    _CYCLE and the largest remainders are rounded up.
    """
    exact = [Fraction(weight).limit_denominator(1000) for weight in weights]
    if all(
        math.isclose(float(one), weight, rel_tol=1e-9, abs_tol=0) for one, weight in zip(exact, weights, strict=True)
    ):
        scaled = [int(one * math.lcm(*(each.denominator for each in exact))) for one in exact]
        common = math.gcd(*scaled)
        if sum(scaled) // common <= _CYCLE:
            return tuple(one // common for one in scaled)
    total = sum(weights)
    shares = [weight / total * _CYCLE for weight in weights]
    whole = [max(int(share), int(weight > 0)) for share, weight in zip(shares, weights, strict=True)]
    for i in sorted(range(len(shares)), key=lambda i: (int(shares[i]) - shares[i], i))[: max(0, _CYCLE - sum(whole))]:
        whole[i] += int(shares[i] > 0)
    return tuple(whole)
