"""Exact deduplication: the first of equal documents, paragraphs or lines is kept.

Texts are compared by 64-bit hashes (XXH3). Among n texts, a wrong match is expected with probability n^2 / 2^65: 0.03
for a billion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from ptft_dist.config.cleaning import ExactDedupStep
from ptft_dist.data.cleaning.texts import record_unit

MIN_CHARACTERS = 20
_SORTED_AT_ONCE = 1 << 20  # hashes, at least; each needs about 25 bytes of memory
_PASSES = 64  # over all hashes, at most
_PIECES = {"line": re.compile(r"[^\n]*\n?"), "paragraph": re.compile(r".*?(?:\n[^\S\n]*\n\s*|\Z)", re.DOTALL)}


class ExactDedup:
    """Keeps the first of equal documents, lines or paragraphs; a `Deduplication`."""

    libraries: ClassVar[tuple[str, ...]] = ("xxhash",)

    def __init__(self, settings: ExactDedupStep) -> None:
        self.by_record = settings.unit == "document"
        self._unit = settings.unit
        self._least = settings.min_characters or MIN_CHARACTERS

    def units(self, texts: Sequence[str]) -> list[str]:
        """The texts that are compared: all texts of a record as one, or its long lines or paragraphs, stripped."""
        if self.by_record:
            return [record_unit(texts, "\x1f")]
        return [key for text in texts for piece in self._pieces(text) if (key := self._key(piece))]

    def without(self, text: str, kept: Sequence[bool]) -> str:
        """The text without the units that are not kept. kept: for each unit of this text, in order."""
        flags = iter(kept)
        return "".join(piece for piece in self._pieces(text) if not self._key(piece) or next(flags))

    def sign(self, units: Sequence[str]) -> np.ndarray:
        """The hashes of units: uint64 [N, 1]."""
        from xxhash import xxh3_64_intdigest

        hashes = (xxh3_64_intdigest(unit.encode("utf-8", "surrogatepass")) for unit in units)
        return np.fromiter(hashes, np.uint64, len(units))[:, None]

    def originals(self, signatures: Sequence[np.ndarray]) -> np.ndarray:
        """For each unit of all shards the first equal one: int64 [N], counted through all shards."""
        starts = np.cumsum([0, *map(len, signatures)])
        original = np.arange(starts[-1])
        buckets = min(_PASSES, -(-int(starts[-1]) // _SORTED_AT_ONCE) or 1)
        for bucket in range(buckets):
            positions, hashes = [], []
            for start, shard in zip(starts, signatures, strict=False):
                chosen = np.flatnonzero((shard[:, 0] >> np.uint64(40)) % np.uint64(buckets) == bucket)
                positions.append(chosen + start)
                hashes.append(shard[chosen, 0])
            position, key = np.concatenate(positions), np.concatenate(hashes)
            order = np.argsort(key, kind="stable")
            position, key = position[order], key[order]
            first = np.flatnonzero(np.concatenate(([True], key[1:] != key[:-1]))) if len(key) else np.empty(0, np.int64)
            original[position] = np.repeat(position[first], np.diff(np.concatenate((first, [len(key)]))))
        return original

    def _pieces(self, text: str) -> list[str]:
        """The parts of a text with the line ends that follow them; together they are the text."""
        return [piece for piece in _PIECES[self._unit].findall(text) if piece]

    def _key(self, piece: str) -> str:
        """What is compared; empty for a short piece."""
        stripped = piece.strip()
        return stripped if len(stripped) >= self._least else ""
