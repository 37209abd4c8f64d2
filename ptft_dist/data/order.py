"""Which rows go into which update, and which of them form a micro-batch: pure functions, nothing to save or skip.

The rows of all epochs form one endless stream. Position p of the stream belongs to epoch p // rows, and the row that
stands there is a pseudo-random permutation of p % rows, keyed by (seed, epoch). It is computed for any position alone,
so resuming at any point costs nothing, and it knows nothing of ranks or workers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

ROUNDS = 6
SCAN_ROWS = 1 << 20


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"order/{seed}/{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit flips about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(positions: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The images of `positions` (each in [0, size)) under the permutation of [0, size) that (seed, epoch) names.

    A balanced Feistel network on the smallest even number of bits that holds `size`, walked on while the image lies
    outside (cycle walking: Black and Rogaway 2002). Memory and time follow len(positions), not size.
    """
    half_bits = np.uint64(max(1, ((max(size - 1, 1)).bit_length() + 1) // 2))
    half_mask = np.uint64((1 << int(half_bits)) - 1)
    keys = _round_keys(seed, epoch)
    values = positions.astype(np.uint64)
    outside = np.arange(len(values))
    while len(outside):
        left, right = values[outside] >> half_bits, values[outside] & half_mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & half_mask)
        values[outside] = (left << half_bits) | right
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


def rows_at(start: int, stop: int, rows: int, seed: int) -> np.ndarray:
    """The rows at stream positions [start, stop), in order: int64 [stop - start]."""
    pieces = []
    while start < stop:
        epoch, offset = divmod(start, rows)
        end = min(stop, (epoch + 1) * rows)
        pieces.append(permute(np.arange(offset, offset + end - start), rows, seed, epoch))
        start = end
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


@dataclass(frozen=True)
class Plan:
    """The whole run as a table of updates: update k takes stream positions [bounds(k), bounds(k + 1))."""

    rows: int
    seed: int
    total_steps: int
    global_size: int | None
    end: int | None  # stream positions in the run, where the last update is a short one
    starts: np.ndarray | None  # [total_steps + 1], where updates have unequal numbers of rows

    def rows_of(self, step: int) -> np.ndarray:
        """The rows of update `step`, in stream order."""
        return rows_at(*self.positions(step), self.rows, self.seed)

    def epochs_of(self, step: int) -> np.ndarray:
        """The epoch, from 0, to which each row of update `step` belongs."""
        return np.arange(*self.positions(step)) // self.rows

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
    rows: int,
    lengths: Callable[[np.ndarray], np.ndarray],
    seed: int,
    *,
    global_size: int | None = None,
    global_tokens: int | None = None,
    max_steps: int | None = None,
    epochs: float | None = None,
    max_tokens: int | None = None,
) -> Plan:
    """The plan of a run over `rows` rows, where `lengths(indices)` gives tokens per row.

    Exactly one of global_size and global_tokens, and one of max_steps, epochs and max_tokens, is given. Rows of equal
    length need no look at the data; a plan that counts the tokens of unequal rows reads the lengths once.
    """
    end = None if epochs is None else max(1, round(epochs * rows))
    if global_size is not None and max_tokens is None:
        steps = max_steps if end is None else -(-end // global_size)
        assert steps is not None
        return Plan(rows, seed, steps, global_size, end, None)
    starts = [0]
    position = filled = tokens = 0
    scan = min(SCAN_ROWS, max(rows, 1024))  # a few rows would be permuted once per epoch, a million positions ahead
    while True:
        window = rows_at(position, position + scan if end is None else min(end, position + scan), rows, seed)
        for length in lengths(window).tolist():
            taken = position - starts[-1]
            full = taken == global_size if global_tokens is None else taken > 0 and filled + length > global_tokens
            if full:
                starts.append(position)
                filled = 0
                if len(starts) - 1 == max_steps or (max_tokens is not None and tokens >= max_tokens):
                    return Plan(rows, seed, len(starts) - 1, None, None, np.asarray(starts))
            filled += length
            tokens += length
            position += 1
        if end is not None and position == end:
            return Plan(rows, seed, len(starts), None, None, np.asarray([*starts, end]))


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
