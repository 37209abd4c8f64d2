"""Near-deduplication: the first of similar records is kept.

The Jaccard similarity of two sets of n-grams is the probability that their MinHash values agree (Broder 1997). The
signature of a record has `hashes` such values, from rensa. Records whose signatures agree in a whole band (locality-
sensitive hashing) are compared by their whole signatures; similar ones are joined to groups, as Lee et al. 2022 do
(arXiv 2107.06499, section 4.2). A group may contain two records that are similar only through others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from ptft_dist.config.cleaning import NearDedupStep
from ptft_dist.data.cleaning.texts import record_unit
from ptft_dist.data.cleaning.words import words
from ptft_dist.data.workers import variable

RECALL = 0.98
"""Bands are chosen so that a pair at the threshold meets in one of them with at least this probability."""
_SEED = 20
_THREADS = "RAYON_NUM_THREADS"
_NEIGHBORS = 8  # members of a band's group that a record is compared with, besides the first
_COMPARED_AT_ONCE = 1 << 14  # pairs of signatures


class NearDedup:
    """Keeps the first of records whose sets of n-grams are similar; a `Deduplication`."""

    libraries: ClassVar[tuple[str, ...]] = ("rensa", "xxhash")
    by_record = True

    def __init__(self, settings: NearDedupStep) -> None:
        self._settings = settings
        self.rows = rows_per_band(settings.threshold, settings.hashes)

    def units(self, texts: Sequence[str]) -> list[str]:
        """The texts of a record as one."""
        return [record_unit(texts, "\n")]

    def without(self, text: str, kept: Sequence[bool]) -> str:
        """Not used: records are kept or dropped as a whole."""
        raise NotImplementedError

    def sign(self, units: Sequence[str]) -> np.ndarray:
        """The MinHash signatures of texts: uint32 [N, hashes]."""
        from rensa import RMinHash

        if not units:
            return np.empty((0, self._settings.hashes), np.uint32)
        grams = [ngram_hashes(unit, self._settings.ngram) for unit in units]
        ends = np.cumsum([0, *map(len, grams)], dtype=np.uint64)
        # rensa's threads of this process would be missing in a forked one, which would wait for them for ever. Chunks
        # are signed in several processes anyway.
        with variable(_THREADS, "1"):
            matrix = RMinHash.digest_matrix_from_flat_token_hashes(
                np.concatenate(grams), ends, self._settings.hashes, _SEED
            )
        return np.asarray(matrix.to_rows(), np.uint32)

    def originals(self, signatures: Sequence[np.ndarray]) -> np.ndarray:
        """For each record of all shards the first one of its group: int64 [N], counted through all shards."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        stacked = _Stacked(signatures)
        count = len(stacked)
        first = np.arange(count)  # of the group of each record
        for band in range(self._settings.hashes // self.rows):
            joined = []
            for one, other in stacked.candidates(slice(band * self.rows, (band + 1) * self.rows)):
                apart = first[one] != first[other]
                joined += list(self._similar(stacked, one[apart], other[apart]))
            if joined:
                one, other = first[np.concatenate(joined, axis=1)]
                edges = coo_array((np.ones(len(one), np.int8), (one, other)), shape=(count, count))
                labels = connected_components(edges, directed=False)[1]
                smallest = np.full(labels.max() + 1, count)
                np.minimum.at(smallest, labels, np.arange(count))
                first = smallest[labels][first]
        return first

    def _similar(self, stacked: _Stacked, one: np.ndarray, other: np.ndarray) -> Iterator[np.ndarray]:
        """The pairs that are similar: int64 [2, P] in parts."""
        for start in range(0, len(one), _COMPARED_AT_ONCE):
            pair = np.stack((one[start : start + _COMPARED_AT_ONCE], other[start : start + _COMPARED_AT_ONCE]))
            pair = np.unique(pair, axis=1)
            similarity = (stacked.rows(pair[0]) == stacked.rows(pair[1])).mean(axis=1)
            yield pair[:, similarity >= self._settings.threshold]


class _Stacked:
    """The signatures of all shards as one matrix, without a copy."""

    def __init__(self, shards: Sequence[np.ndarray]) -> None:
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The rows `indices`: uint32 [len(indices), hashes]."""
        rows = np.empty((len(indices), self._shards[0].shape[1]), np.uint32)
        shard = np.searchsorted(self._starts, indices, side="right") - 1
        for number in np.unique(shard):
            mask = shard == number
            rows[mask] = self._shards[number][indices[mask] - self._starts[number]]
        return rows

    def candidates(self, band: slice) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of rows that agree in the columns of a band: each row with the first and the nearest earlier ones."""
        keys = np.concatenate([_mixed(shard[:, band]) for shard in self._shards])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        begins = np.concatenate(([True], keys[1:] != keys[:-1]))[: len(keys)]
        first = np.maximum.accumulate(np.where(begins, np.arange(len(keys)), 0))
        yield order[first[~begins]], order[~begins]
        for distance in range(1, _NEIGHBORS + 1):
            same = np.flatnonzero(first[distance:] <= np.arange(len(keys) - distance))
            same = same[first[same + distance] < same]  # the first one is compared above
            if not len(same):
                return
            yield order[same], order[same + distance]


def _mixed(columns: np.ndarray) -> np.ndarray:
    """One number for each row of a matrix: uint64 [N]. Equal rows have equal numbers."""
    mixed = np.zeros(len(columns), np.uint64)
    for column in columns.T:
        mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return mixed


def rows_per_band(threshold: float, hashes: int) -> int:
    """The largest number of rows per band with which similar pairs are found.

    A pair of similarity s meets in one of b bands of r rows with the probability 1 - (1 - s^r)^b.
    """
    for rows in range(hashes, 1, -1):
        if 1 - (1 - threshold**rows) ** (hashes // rows) >= RECALL:
            return rows
    return 1


def ngram_hashes(text: str, length: int) -> np.ndarray:
    """Hashes of the n-grams of words: uint64, at least one; a shorter text is one n-gram."""
    from xxhash import xxh3_64_intdigest

    hashes = np.fromiter((xxh3_64_intdigest(word.encode("utf-8", "surrogatepass")) for word in words(text)), np.uint64)
    if not len(hashes):
        return np.array([xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))], np.uint64)
    length = min(length, len(hashes))
    grams = np.zeros(len(hashes) - length + 1, np.uint64)
    for offset in range(length):
        grams = (grams ^ hashes[offset : offset + len(grams)]) * np.uint64(0x9E3779B97F4A7C15)
        grams ^= grams >> np.uint64(32)
    return grams
