"""The order of rows: which rows form each update and each micro-batch. Pure functions without state to save.

The rows of all epochs form one endless stream. Position p of the stream belongs to epoch p // rows. Its row is the
image of p % rows under a pseudo-random permutation keyed by (seed, epoch). Each position is computed independently, so
resuming skips nothing, and the order does not depend on ranks or workers.

Several stores are mixed by weight: a fixed cycle defines the store of each position, and each store has its own stream.
The weights may change at given positions (`Period`).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np

from ptft_dist.data.plan_cache import remembered

ROUNDS = 6
SCAN_ROWS = 1 << 20
LONGEST_CYCLE = 100_000


def _round_keys(seed: int, epoch: int, store: int) -> np.ndarray:
    name = f"order/{seed}/{epoch}" + (f"/{store}" if store else "")
    digest = hashlib.blake2b(name.encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele et al. 2014): every input bit flips about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: np.ndarray, size: int, seed: int, epoch: int, store: int = 0) -> np.ndarray:
    """Images of `positions` under the permutation of [0, size) keyed by (seed, epoch, store): int64, same shape.

    A balanced Feistel network on the smallest sufficient even number of bits. It is applied again to images outside of
    [0, size) (cycle walking, Black and Rogaway 2002). Memory and time grow with len(positions), not with size.
    """
    half_bits = np.uint64(max(1, ((max(size - 1, 1)).bit_length() + 1) // 2))
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    keys = _round_keys(seed, epoch, store)
    values = positions.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half_bits, values[outside] & half_mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & half_mask)
        values[outside] = (left << half_bits) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def rows_at(start: int, stop: int, rows: int, seed: int, store: int = 0) -> np.ndarray:
    """The rows at positions [start, stop) of one store's stream: int64 [stop - start]."""
    pieces = []
    while start < stop:
        epoch, offset = divmod(start, rows)
        end = min(stop, (epoch + 1) * rows)
        pieces.append(permute(np.arange(offset, offset + end - start), rows, seed, epoch, store))
        start = end
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def interleave(weights: Sequence[int]) -> np.ndarray:
    """The store of each position in a cycle: int64 [sum(weights)]. Store i occurs weights[i] times, evenly spread.

    Evenly means: among the first p positions, the count of store i differs from p * weights[i] / sum(weights) by less
    than 1. This holds for every p, also in the repeated cycle.

    The algorithm is pfair scheduling on one processor (Baruah et al. 1996). Let share = weights[i] / sum(weights), and
    count the draws from store i as n = 0, 1, 2, ... Draw n may not happen before position floor(n / share), and must
    happen before position ceil((n + 1) / share), its deadline. Each position takes the allowed draw with the earliest
    deadline. This meets all deadlines.

    Raises:
        ValueError: a weight is below 1, or the weights sum to more than LONGEST_CYCLE.
    """
    cycle = sum(weights)
    if min(weights) < 1 or cycle > LONGEST_CYCLE:
        raise ValueError(f"weights {list(weights)}: use whole numbers from 1, with a sum of up to {LONGEST_CYCLE}")
    drawn = [0] * len(weights)
    order = np.empty(cycle, np.int64)
    for position in range(cycle):
        allowed = [i for i, weight in enumerate(weights) if drawn[i] * cycle // weight <= position]
        store = min(allowed, key=lambda i: (-(-(drawn[i] + 1) * cycle // weights[i]), i))
        order[position] = store
        drawn[store] += 1
    return order


@dataclass(frozen=True)
class Period:
    """An interval of positions in which stores are drawn with constant weights."""

    start: int
    """Its first position. It ends where the next period starts; the last one has no end."""
    weights: tuple[int, ...]
    """Whole numbers: (3, 1) draws three rows from the first store for each row from the second; 0: none."""

    @cached_property
    def cycle(self) -> np.ndarray:
        """The store of each position, repeated: int64 [sum(weights)]."""
        used = np.flatnonzero(self.weights)
        return used[interleave([self.weights[i] for i in used])]


@dataclass(frozen=True)
class Stream:
    """The endless stream of rows of one or several stores: a pure function of the position.

    Row numbers run through all stores: row r of store i has the number sum(sizes[:i]) + r. Each store has its own
    epochs.
    """

    sizes: tuple[int, ...]
    """Number of rows of each store."""
    seed: int
    periods: tuple[Period, ...] = (Period(0, (1,)),)

    def __post_init__(self) -> None:
        assert all(len(self.sizes) == len(period.weights) for period in self.periods)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows at positions [start, stop): int64 [stop - start]."""
        if len(self.sizes) == 1:
            return rows_at(start, stop, self.sizes[0], self.seed)
        rows, first_row = np.empty(stop - start, np.int64), 0
        for store, (size, (indices, first)) in enumerate(zip(self.sizes, self._draws(start, stop), strict=True)):
            rows[indices] = first_row + rows_at(first, first + len(indices), size, self.seed, store)
            first_row += size
        return rows

    def epochs(self, start: int, stop: int) -> np.ndarray:
        """The epoch (from 0, within its store) of the row at each position in [start, stop): int64 [stop - start]."""
        if len(self.sizes) == 1:
            return np.arange(start, stop) // self.sizes[0]
        epochs = np.empty(stop - start, np.int64)
        for size, (indices, first) in zip(self.sizes, self._draws(start, stop), strict=True):
            epochs[indices] = np.arange(first, first + len(indices)) // size
        return epochs

    def position_after(self, drawn: int) -> int:
        """The number of positions that contain at least this many rows of the first store. See `interleave`.

        For a stream of one period.
        """
        (period,) = self.periods
        return -(-drawn * sum(period.weights) // period.weights[0])

    def _draws(self, start: int, stop: int) -> list[tuple[np.ndarray, int]]:
        """For each store: its indices within [start, stop), and the number of its draws before `start`."""
        starts = [period.start for period in self.periods]
        first = bisect_right(starts, start) - 1
        before = self._drawn[first] + _counts(self.periods[first], start - starts[first])
        pieces, position = [], start
        for number in range(first, len(starts)):
            end = min(stop, starts[number + 1]) if number + 1 < len(starts) else stop
            cycle = self.periods[number].cycle
            pieces.append(cycle[np.arange(position - starts[number], end - starts[number]) % len(cycle)])
            position = end
            if position >= stop:
                break
        stores = np.concatenate(pieces)
        return [(np.flatnonzero(stores == store), int(before[store])) for store in range(len(self.sizes))]

    @cached_property
    def _drawn(self) -> list[np.ndarray]:
        """For each period, the draws from each store before it."""
        drawn = [np.zeros(len(self.sizes), np.int64)]
        for period, following in pairwise(self.periods):
            drawn.append(drawn[-1] + _counts(period, following.start - period.start))
        return drawn


def _counts(period: Period, positions: int) -> np.ndarray:
    """The draws from each store in the first positions of a period: int64 [stores]."""
    laps, offset = divmod(positions, len(period.cycle))
    return laps * np.array(period.weights) + np.bincount(period.cycle[:offset], minlength=len(period.weights))


@dataclass(frozen=True)
class Plan:
    """The updates of a whole run, each an interval of stream positions."""

    stream: Stream
    total_steps: int
    global_size: int | None
    """Rows per update; None if updates have different numbers of rows."""
    end: int | None
    """Number of stream positions in the run, if the last update may be smaller than the others."""
    starts: np.ndarray | None = field(repr=False)
    """int64 [total_steps + 1]: the first position of each update, if updates have different numbers of rows."""

    def rows_of(self, step: int) -> np.ndarray:
        """The rows of update `step`, in stream order."""
        return self.stream.rows(*self.positions(step))

    def epochs_of(self, step: int) -> np.ndarray:
        """The epoch (from 0) of each row of update `step`."""
        return self.stream.epochs(*self.positions(step))

    def positions(self, step: int) -> tuple[int, int]:
        """The stream positions [start, stop) of update `step`."""
        if self.starts is not None:
            start, stop = int(self.starts[step]), int(self.starts[step + 1])
        else:
            assert self.global_size is not None
            start, stop = step * self.global_size, (step + 1) * self.global_size
        if self.end is not None:
            stop = min(stop, self.end)
        return start, stop


def make_plan(
    rows: int | Sequence[int],
    lengths: Callable[[np.ndarray], np.ndarray],
    seed: int,
    *,
    periods: Sequence[Period] = (Period(0, (1,)),),
    global_size: int | None = None,
    global_tokens: int | None = None,
    max_steps: int | None = None,
    epochs: float | None = None,
    max_tokens: int | None = None,
    cache: Path | None = None,
) -> Plan:
    """The plan of a run over one or several stores.

    Give exactly one of global_size and global_tokens, and exactly one of max_steps, epochs and max_tokens. A plan with
    global_size and without max_tokens does not depend on the lengths of rows. All other plans read the lengths once.

    Args:
        rows: number of rows of the store, or of each store.
        lengths: returns the number of tokens of rows, given their numbers in the stream.
        periods: see Stream; with `epochs`, only one.
        global_size: rows per update.
        global_tokens: maximum number of tokens per update; an update has at least one row.
        max_steps: number of updates.
        epochs: an epoch ends when as many rows of the first store have been drawn as it has.
        max_tokens: the run ends with the first update after which this many tokens have been read.
        cache: directory for plans that read lengths. It must belong to the data that `lengths` reads.
    """
    stream = Stream((rows,) if isinstance(rows, int) else tuple(rows), seed, tuple(periods))
    end = None if epochs is None else stream.position_after(max(1, round(epochs * stream.sizes[0])))
    if global_size is not None and max_tokens is None:
        steps = max_steps if end is None else -(-end // global_size)
        assert steps is not None
        return Plan(stream, steps, global_size, end, None)
    scan = Scan(stream, lengths, global_size, global_tokens, max_steps, end, max_tokens)
    if cache is None:
        starts = scan.starts()
    else:
        weights = [[period.start, period.weights] for period in stream.periods]
        mixture = stream.periods[0].weights if len(stream.periods) == 1 else weights
        key = [1, stream.sizes, seed, mixture, global_size, global_tokens, max_steps, end, max_tokens]
        starts = remembered(cache, key, scan.starts)
    return Plan(stream, len(starts) - 1, None, None, starts)


@dataclass(frozen=True)
class Scan:
    """Reads the lengths of the stream's rows, window by window, to compute where each update begins."""

    stream: Stream
    lengths: Callable[[np.ndarray], np.ndarray]
    global_size: int | None
    global_tokens: int | None
    max_steps: int | None
    end: int | None
    max_tokens: int | None

    def starts(self) -> np.ndarray:
        """The stream position at which each update begins, and the end of the last one: int64 [updates + 1].

        An update is complete if the next row does not fit, so a complete update ends within its window. The next
        window begins with the first incomplete update.
        """
        begins, tokens = [0], 0
        # Small stores get small windows: a window of SCAN_ROWS would contain many unneeded epochs.
        width = min(SCAN_ROWS, max(sum(self.stream.sizes), 1024))
        while True:
            start = begins[-1]
            stop = start + width if self.end is None else min(start + width, self.end)
            totals = np.concatenate(([0], np.cumsum(self.lengths(self.stream.rows(start, stop)), dtype=np.int64)))
            ends = self._update_ends(totals)
            if not ends and stop != self.end:
                width *= 2
            read_tokens = tokens + totals[ends]
            if self.max_tokens is not None and len(read_tokens) and read_tokens[-1] >= self.max_tokens:
                ends = ends[: int(np.searchsorted(read_tokens, self.max_tokens)) + 1]
                return np.asarray([*begins, *(start + position for position in ends)])
            begins += [start + position for position in ends]
            tokens = int(read_tokens[-1]) if len(read_tokens) else tokens
            if self.max_steps is not None and len(begins) > self.max_steps:
                return np.asarray(begins[: self.max_steps + 1])
            if stop == self.end:
                return np.asarray([*begins, stop])

    def _update_ends(self, totals: np.ndarray) -> list[int]:
        """The end of each complete update in a window. totals: number of tokens before each position [N + 1]."""
        rows = len(totals) - 1
        if self.global_tokens is None:
            assert self.global_size is not None
            return list(range(self.global_size, rows, self.global_size))
        # For each position: the end of an update that begins there, which is the first row that exceeds global_tokens.
        end_of = np.searchsorted(totals, totals[:-1] + self.global_tokens, side="right") - 1
        end_of = np.maximum(end_of, np.arange(1, rows + 1)).tolist()
        ends, position = [], 0
        while (position := end_of[position]) < rows:
            ends.append(position)
        return ends


def split_update(
    lengths: np.ndarray,
    world_size: int,
    *,
    micro_size: int | None = None,
    micro_tokens: int | None = None,
    group_by_length: bool = True,
) -> list[list[np.ndarray]]:
    """Split the rows of one update into micro-batches: result[accumulation][rank] = indices into `lengths`.

    All ranks get the same number of micro-batches, as data parallelism requires. In a small last update, some
    micro-batches may be empty. `group_by_length` sorts the rows by length, longest first: there is less padding, the
    ranks of an accumulation step have equal work, and an out-of-memory error occurs at the start.
    """
    order = np.argsort(-lengths, kind="stable") if group_by_length else np.arange(len(lengths))
    if micro_size is not None:
        accumulation = -(-len(order) // (micro_size * world_size))
        chunks = np.array_split(order, accumulation * world_size)
    else:
        assert micro_tokens is not None
        chunks = _chunks_by_tokens(order, lengths, micro_tokens)
        while len(chunks) % world_size:
            chunks = _one_chunk_more(chunks, lengths)
    return [chunks[i : i + world_size] for i in range(0, len(chunks), world_size)]


def _chunks_by_tokens(order: np.ndarray, lengths: np.ndarray, micro_tokens: int) -> list[np.ndarray]:
    """Split `order` into consecutive chunks with a padded size (rows x longest row) of at most `micro_tokens`."""
    chunks, first, longest = [], 0, 0
    for i, length in enumerate(lengths[order].tolist()):
        longest = max(longest, length)
        if i > first and longest * (i + 1 - first) > micro_tokens:
            chunks.append(order[first:i])
            first, longest = i, length
    chunks.append(order[first:])
    return chunks


def _one_chunk_more(chunks: list[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    """Split the largest micro-batch with two or more rows into halves; if there is none, add an empty one."""
    size = [len(c) * int(lengths[c].max()) if len(c) > 1 else 0 for c in chunks]
    largest = int(np.argmax(size))
    if size[largest] == 0:
        return [*chunks, np.empty(0, np.int64)]
    middle = len(chunks[largest]) // 2
    halves = [chunks[largest][:middle], chunks[largest][middle:]]
    return [*chunks[:largest], *halves, *chunks[largest + 1 :]]
