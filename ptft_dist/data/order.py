"""Which rows go into which update, and which of them form a micro-batch: pure functions, nothing to save or skip.

The rows of all epochs form one endless stream. Position p of the stream belongs to epoch p // rows, and its row is a
pseudo-random permutation of p % rows, keyed by (seed, epoch). It is computed for any position alone, so resuming at any
point costs nothing, and it does not depend on ranks or workers. Several stores are mixed by weight: a fixed cycle says
which store each position draws from, and each store has a stream of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
    """Images of `positions` (each in [0, size)) under the permutation of [0, size) keyed by (seed, epoch, store).

    A balanced Feistel network on the smallest even number of bits that holds `size`, applied again while the image lies
    outside (cycle walking: Black and Rogaway 2002). Memory and time grow with len(positions), not with size.
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
    """The rows at positions [start, stop) of the stream of one store, in order: int64 [stop - start]."""
    pieces = []
    while start < stop:
        epoch, offset = divmod(start, rows)
        end = min(stop, (epoch + 1) * rows)
        pieces.append(permute(np.arange(offset, offset + end - start), rows, seed, epoch, store))
        start = end
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def interleave(weights: Sequence[int]) -> np.ndarray:
    """Which store each position of a cycle draws from: int64 [sum of weights], store i exactly weights[i] times.

    In every prefix of p positions, and so at every position of the repeated cycle, store i has been drawn from
    p * weights[i] / sum(weights) times, up to less than 1 more or less. Draw n (from 0) of a store is possible from
    position floor(n / share) and due before ceil((n + 1) / share); the possible draw that is due first is taken, which
    meets every due position (Baruah et al. 1996, pfair scheduling, on one processor).

    Raises:
        ValueError: a weight is below 1, or the weights sum to more than LONGEST_CYCLE.
    """
    cycle = sum(weights)
    if min(weights) < 1 or cycle > LONGEST_CYCLE:
        raise ValueError(f"weights {list(weights)}: use whole numbers from 1, with a sum of up to {LONGEST_CYCLE}")
    drawn = [0] * len(weights)
    order = np.empty(cycle, np.int64)
    for position in range(cycle):
        possible = [i for i, weight in enumerate(weights) if drawn[i] * cycle // weight <= position]
        first = min(possible, key=lambda i: (-(-(drawn[i] + 1) * cycle // weights[i]), i))
        order[position] = first
        drawn[first] += 1
    return order


@dataclass(frozen=True)
class Stream:
    """The endless stream of rows of one or several stores: a pure function of the position.

    Rows are numbered through all stores: row r of store i is sum(sizes[:i]) + r. An epoch is counted in each store.
    """

    sizes: tuple[int, ...]
    """Rows in each store."""
    seed: int
    weights: tuple[int, ...] = (1,)
    """Whole numbers: (3, 1) draws three rows of the first store for one of the second."""

    def __post_init__(self) -> None:
        assert len(self.sizes) == len(self.weights)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """The rows at positions [start, stop): int64 [stop - start]."""
        if len(self.sizes) == 1:
            return rows_at(start, stop, self.sizes[0], self.seed)
        rows, first_row = np.empty(stop - start, np.int64), 0
        for store, (size, (places, first)) in enumerate(zip(self.sizes, self._draws(start, stop), strict=True)):
            rows[places] = first_row + rows_at(first, first + len(places), size, self.seed, store)
            first_row += size
        return rows

    def epochs(self, start: int, stop: int) -> np.ndarray:
        """The epoch, from 0, of its own store in which each position draws its row: int64 [stop - start]."""
        if len(self.sizes) == 1:
            return np.arange(start, stop) // self.sizes[0]
        epochs = np.empty(stop - start, np.int64)
        for size, (places, first) in zip(self.sizes, self._draws(start, stop), strict=True):
            epochs[places] = np.arange(first, first + len(places)) // size
        return epochs

    def _draws(self, start: int, stop: int) -> list[tuple[np.ndarray, int]]:
        """For each store: where in [start, stop) it is drawn from, and how many draws it has had before `start`."""
        cycle = self._cycle
        laps, offset = divmod(start, len(cycle))
        stores = cycle[np.arange(start, stop) % len(cycle)]
        before = np.bincount(cycle[:offset], minlength=len(self.sizes))
        return [
            (np.flatnonzero(stores == store), laps * weight + int(before[store]))
            for store, weight in enumerate(self.weights)
        ]

    @cached_property
    def _cycle(self) -> np.ndarray:
        return interleave(self.weights)


@dataclass(frozen=True)
class Plan:
    """The whole run as a table of updates: update k takes stream positions [positions(k))."""

    stream: Stream
    total_steps: int
    global_size: int | None
    end: int | None  # stream positions in the run, where the last update is a short one
    starts: np.ndarray | None = field(repr=False)  # [total_steps + 1], where updates have unequal numbers of rows

    def rows_of(self, step: int) -> np.ndarray:
        """The rows of update `step`, in stream order."""
        return self.stream.rows(*self.positions(step))

    def epochs_of(self, step: int) -> np.ndarray:
        """The epoch, from 0, to which each row of update `step` belongs."""
        return self.stream.epochs(*self.positions(step))

    def positions(self, step: int) -> tuple[int, int]:
        """Where update `step` begins and ends in the stream."""
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
    weights: Sequence[int] = (1,),
    global_size: int | None = None,
    global_tokens: int | None = None,
    max_steps: int | None = None,
    epochs: float | None = None,
    max_tokens: int | None = None,
    cache: Path | None = None,
) -> Plan:
    """The plan of a run over one store, or several.

    Exactly one of global_size and global_tokens, and one of max_steps, epochs and max_tokens, is given. Updates of a
    fixed number of rows and a fixed number of updates or epochs need no lengths; all other plans read them once.

    Args:
        rows: the number of rows of the store, or of each store.
        lengths: tokens of the rows with these indices, which count through all stores.
        weights: see Stream.
        global_size: rows per update. global_tokens: as many rows per update as hold this many tokens together, and at
            least one.
        epochs: of as many stream positions as all stores have rows. max_tokens: the run ends with the first update
            after which this many tokens have been read.
        cache: a directory for plans that read lengths. It must belong to the data that `lengths` reads.
    """
    stream = Stream((rows,) if isinstance(rows, int) else tuple(rows), seed, tuple(weights))
    size = sum(stream.sizes)
    end = None if epochs is None else max(1, round(epochs * size))
    if global_size is not None and max_tokens is None:
        steps = max_steps if end is None else -(-end // global_size)
        assert steps is not None
        return Plan(stream, steps, global_size, end, None)
    scan = Scan(stream, lengths, global_size, global_tokens, max_steps, end, max_tokens)
    if cache is None:
        starts = scan.starts()
    else:
        key = [1, stream.sizes, seed, stream.weights, global_size, global_tokens, max_steps, end, max_tokens]
        starts = remembered(cache, key, scan.starts)
    return Plan(stream, len(starts) - 1, None, None, starts)


@dataclass(frozen=True)
class Scan:
    """Reads the lengths of the stream's rows, window by window, to find where each update begins."""

    stream: Stream
    lengths: Callable[[np.ndarray], np.ndarray]
    global_size: int | None
    global_tokens: int | None
    max_steps: int | None
    end: int | None
    max_tokens: int | None

    def starts(self) -> np.ndarray:
        """Stream positions at which the updates begin, and the position after the last: int64 [updates + 1].

        An update is known to be whole when the row after it does not fit, so it ends within a window. A window begins
        with the first update that the window before did not complete.
        """
        begins, tokens = [0], 0
        # A few rows would be permuted once per epoch, a million positions ahead.
        width = min(SCAN_ROWS, max(sum(self.stream.sizes), 1024))
        while True:
            start = begins[-1]
            stop = start + width if self.end is None else min(start + width, self.end)
            totals = np.concatenate(([0], np.cumsum(self.lengths(self.stream.rows(start, stop)), dtype=np.int64)))
            found = self._updates(totals)
            if not found and stop != self.end:
                width *= 2
            read = tokens + totals[found]
            if self.max_tokens is not None and len(read) and read[-1] >= self.max_tokens:
                found = found[: int(np.searchsorted(read, self.max_tokens)) + 1]
                return np.asarray([*begins, *(start + position for position in found)])
            begins += [start + position for position in found]
            tokens = int(read[-1]) if len(read) else tokens
            if self.max_steps is not None and len(begins) > self.max_steps:
                return np.asarray(begins[: self.max_steps + 1])
            if stop == self.end:
                return np.asarray([*begins, stop])

    def _updates(self, totals: np.ndarray) -> list[int]:
        """Where each complete update of a window ends. totals: tokens before each position of the window [N + 1]."""
        rows = len(totals) - 1
        if self.global_tokens is None:
            assert self.global_size is not None
            return list(range(self.global_size, rows, self.global_size))
        # For every position, where an update that begins there ends: at the first row that goes beyond the tokens.
        ends = np.searchsorted(totals, totals[:-1] + self.global_tokens, side="right") - 1
        ends = np.maximum(ends, np.arange(1, rows + 1)).tolist()
        found, position = [], 0
        while (position := ends[position]) < rows:
            found.append(position)
        return found


def split_update(
    lengths: np.ndarray,
    world_size: int,
    *,
    micro_size: int | None = None,
    micro_tokens: int | None = None,
    group_by_length: bool = True,
) -> list[list[np.ndarray]]:
    """Cut the rows of one update into micro-batches: result[accumulation][rank] = indices into `lengths`.

    Every rank gets the same number of micro-batches (data parallelism needs it); one may be empty in a small last
    update. With `group_by_length`, rows of like length stand together, the longest first, so that little is padded,
    the ranks of one accumulation step have equal work, and an out-of-memory error comes at once.
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
    """Consecutive pieces of `order` whose padded size, rows x longest row, stays within `micro_tokens`."""
    chunks, first, longest = [], 0, 0
    for i, length in enumerate(lengths[order].tolist()):
        longest = max(longest, length)
        if i > first and longest * (i + 1 - first) > micro_tokens:
            chunks.append(order[first:i])
            first, longest = i, length
    chunks.append(order[first:])
    return chunks


def _one_chunk_more(chunks: list[np.ndarray], lengths: np.ndarray) -> list[np.ndarray]:
    """Halve the largest micro-batch that has two rows or more; if there is none, add an empty one."""
    size = [len(c) * int(lengths[c].max()) if len(c) > 1 else 0 for c in chunks]
    largest = int(np.argmax(size))
    if size[largest] == 0:
        return [*chunks, np.empty(0, np.int64)]
    middle = len(chunks[largest]) // 2
    halves = [chunks[largest][:middle], chunks[largest][middle:]]
    return [*chunks[:largest], *halves, *chunks[largest + 1 :]]
