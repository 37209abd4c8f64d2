"""Which units of all shards a deduplication keeps: the signatures of the shards are compared by one process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ptft_dist.data.cache import build_once, writing
from ptft_dist.data.cleaning.deduplication import Deduplication
from ptft_dist.data.cleaning.record_file import read_records
from ptft_dist.data.cleaning.stage import RECORDS, SIGNATURES, Kept
from ptft_dist.data.cleaning.tally import SHOWN
from ptft_dist.data.cleaning.texts import compared_texts
from ptft_dist.data.encoder import Side
from ptft_dist.errors import DataError
from ptft_dist.reporting.messages import say

_KEPT, _ORIGINALS = "kept.npy", "originals.json"
_EXCERPT = 300  # characters


class Comparison:
    """The result for all shards, in the cache.

    kept.npy        bool [N]: whether each unit of all shards is kept, in the order of the shards
    originals.json  number of a dropped record -> the beginning of the record that is kept instead; for the first ones
    """

    def __init__(
        self, dedup: Deduplication, roles: tuple[str, ...], sides: Sequence[Side], shards: Sequence[Path], path: Path
    ) -> None:
        """shards: their directories. path: of the result."""
        self._dedup, self._roles, self._sides, self._shards, self.path = dedup, roles, sides, shards, path

    def build(self) -> None:
        """Compare the signatures, unless the cache has the result."""
        build_once(self.path, self._build)

    def kept(self, number: int) -> Kept:
        """Which records of shard `number` are kept.

        Raises:
            DataError: the cache is damaged.
        """
        try:
            starts = self._starts
            mask = np.load(self.path / _KEPT, mmap_mode="r")[starts[number] : starts[number + 1]]
            originals = json.loads((self.path / _ORIGINALS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path}: damaged ({error}). Delete this directory and start again.") from error
        start = int(starts[number])
        return Kept(self._dedup, self._roles, mask, {int(at) - start: text for at, text in originals.items()})

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first unit of each shard, counted through all of them, and their number: int64 [shards + 1]."""
        return np.cumsum([0, *map(len, self._signatures())])

    def _signatures(self) -> list[np.ndarray]:
        return [np.load(shard / SIGNATURES, mmap_mode="r") for shard in self._shards]

    def _build(self, unfinished: Path) -> None:
        signatures, starts = self._signatures(), self._starts
        say(f"comparing {int(starts[-1]):,} {'records' if self._dedup.by_record else 'parts of texts'} ...")
        order = sorted(range(len(signatures)), key=lambda i: (self._sides[i] == "train", i))  # validation goes first
        original = self._dedup.originals([signatures[i] for i in order])
        without_text = self._dedup.sign([""])  # nothing says that two such records are equal, so both are kept
        kept = np.ones(int(starts[-1]), bool)
        place = np.empty(int(starts[-1]), np.int64)  # of each unit in the order of the shards
        start = 0
        for i in order:
            stop = start + len(signatures[i])
            place[start:stop] = np.arange(starts[i], starts[i + 1])
            if self._sides[i] == "train":
                kept[starts[i] : starts[i + 1]] = original[start:stop] == np.arange(start, stop)
                if self._dedup.by_record:
                    kept[starts[i] : starts[i + 1]] |= (signatures[i] == without_text).all(axis=1)
            start = stop
        shown = np.flatnonzero(~kept)[:SHOWN].tolist() if self._dedup.by_record else []
        inverse = np.argsort(place, kind="stable") if shown else place
        originals = {number: int(place[original[inverse[number]]]) for number in shown}
        texts = self._texts(set(originals.values()), starts)
        with writing(self.path):
            np.save(unfinished / _KEPT, kept)
            (unfinished / _ORIGINALS).write_text(
                json.dumps({number: texts[at] for number, at in originals.items()}), encoding="utf-8"
            )

    def _texts(self, numbers: set[int], starts: np.ndarray) -> dict[int, str]:
        """The beginnings of the texts of these records, counted through all shards."""
        texts: dict[int, str] = {}
        for shard, start, stop in zip(self._shards, starts.tolist(), starts.tolist()[1:], strict=False):
            wanted = {number for number in numbers if start <= number < stop}
            if not wanted:
                continue
            for number, record in enumerate(read_records(shard / RECORDS), start):
                if number in wanted:
                    texts[number] = "\n".join(compared_texts(record.values, self._roles))[:_EXCERPT]
                if number == max(wanted):
                    break
        return texts
