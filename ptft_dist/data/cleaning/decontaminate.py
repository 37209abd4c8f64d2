"""Removal of training records that contain evaluation data."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from ptft_dist.config.cleaning import DecontaminateStep
from ptft_dist.config.recipe import Source
from ptft_dist.data.cache import HashMemo
from ptft_dist.data.cleaning.text_step import Cleaned
from ptft_dist.data.cleaning.words import folded_words
from ptft_dist.data.formats import read_file
from ptft_dist.data.sources import source_files
from ptft_dist.errors import DataError

SHORTEST = 8
"""Evaluation texts with fewer words are not searched for: they occur by chance."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 2**64))


class Decontaminate:
    """Drops texts that share an n-gram of words with evaluation files, 13 words by default (Brown et al. 2020, appendix
    C). GPT-3 used 8 to 13 words, by the length of the examples; here a text of 8 to 12 words is compared as a whole.

    Matches are exact: a hash only finds candidates. The index has 28 bytes for each word of the evaluation files.
    """

    libraries: ClassVar[tuple[str, ...]] = ()
    edits: ClassVar[bool] = False

    def __init__(self, settings: DecontaminateStep, base: Path) -> None:
        """base: the recipe's directory.

        Raises:
            DataError: a file is missing, cannot be read, or is malformed; or no text is long enough.
        """
        self._files = _files(settings.files, base)
        self._index = _Index(_texts(self._files, base), settings.ngram)

    def contents(self, memo: HashMemo) -> list[str]:
        """What affects the results besides the settings: the contents of the files."""
        return memo.digests(self._files)

    def __call__(self, text: str) -> Cleaned:
        found = self._index.find(text)
        if found is None:
            return Cleaned(text)
        return Cleaned(text, dropped=f"contaminated: shares {found.words} words with {found.where}")


def _files(patterns: Sequence[str], base: Path) -> list[Path]:
    problems, files = [], []
    for i, pattern in enumerate(patterns):
        try:
            files += source_files(Source(path=pattern), base)
        except DataError as error:
            problems += [f"data.steps: decontaminate: files[{i}]: {line}" for line in str(error).splitlines()]
    if problems:
        raise DataError("\n".join(problems))
    return list(dict.fromkeys(files))


def _texts(files: Sequence[Path], base: Path) -> Iterator[tuple[str, str]]:
    """Each text of the files and the file's name. A paragraph of a .txt file is a text."""
    for file in files:
        name = str(file).removeprefix(f"{base}/")
        for record in read_file(file, columns=(), unit="paragraph"):
            yield from ((text, name) for text in _strings(record.values))


def _strings(value: Any) -> Iterator[str]:
    """All strings in a value of JSON, and lists of strings as one text, since they may be its words."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        if value and all(isinstance(each, str) for each in value):
            yield " ".join(value)
        for each in value:
            yield from _strings(each)


class Found(NamedTuple):
    """A match: its number of words, and where the evaluation text comes from."""

    words: int
    where: str


class _Index:
    """The n-grams of the evaluation texts: for each n, sorted hashes and where each n-gram first occurs."""

    def __init__(self, texts: Iterator[tuple[str, str]], ngram: int) -> None:
        """
        Raises:
            DataError: no text has `SHORTEST` words (or `ngram`, if that is less).
        """
        self._shortest = shortest = min(SHORTEST, ngram)
        self._numbers: dict[str, int] = {}
        self._wheres: list[str] = []
        numbers, starts = array("i"), array("q")
        for text, where in texts:
            words = folded_words(text)
            if len(words) >= shortest:
                starts.append(len(numbers))
                self._wheres.append(where)
                numbers.extend([self._numbers.setdefault(word, len(self._numbers)) for word in words])
        if not starts:
            raise DataError(
                f"data.steps: decontaminate: files: no text has {shortest} words, so nothing can be found. Check the "
                "files, or remove the step."
            )
        self._words = np.frombuffer(numbers, np.int32)
        self._starts = np.frombuffer(starts, np.int64)
        lengths = np.diff(np.append(self._starts, len(self._words)))
        sums = _Sums(self._words)
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for n in range(shortest, ngram + 1):
            at = self._starts[lengths == n]
            if n == ngram:
                at = np.concatenate([np.arange(s, s + k - n + 1) for s, k in zip(self._starts, lengths, strict=True)])
            if len(at):
                hashes, firsts = np.unique(sums.hashes(at, n), return_index=True)
                self._tables[n] = hashes, at[firsts]
        at = np.concatenate([firsts for _, firsts in self._tables.values()])
        self._beginnings = np.unique(sums.hashes(at, shortest))
        """The first `shortest` words of every n-gram: most texts have none of them, and no n-gram is searched for."""

    def find(self, text: str) -> Found | None:
        """The first n-gram of a text, of the shortest n, that an evaluation text has too."""
        words = folded_words(text)
        numbers = np.fromiter(map(self._numbers.get, words, repeat(-1)), np.int32, len(words))
        known = np.append(0, np.cumsum(numbers >= 0))
        at = np.flatnonzero(known[self._shortest :] - known[: -self._shortest] == self._shortest)
        if not len(at):
            return None
        sums = _Sums(numbers)
        at = at[_index(self._beginnings, sums.hashes(at, self._shortest)) >= 0]
        for n, (hashes, firsts) in self._tables.items() if len(at) else ():
            at = at[at + n <= len(numbers)]
            index = _index(hashes, sums.hashes(at, n))
            for i in np.flatnonzero(index >= 0):
                first = firsts[index[i]]
                if np.array_equal(self._words[first : first + n], numbers[at[i] : at[i] + n]):
                    return Found(n, self._wheres[np.searchsorted(self._starts, first, side="right") - 1])
        return None


def _index(table: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The index of each value in a sorted table; -1 if it is not there."""
    index = np.minimum(np.searchsorted(table, values), len(table) - 1)
    return np.where(table[index] == values, index, -1)


class _Sums:
    """64-bit hashes of n-grams: polynomials, by differences of prefix sums.

    A difference is the polynomial times base**position, so it is multiplied by the inverse of that, modulo 2**64.
    """

    def __init__(self, numbers: np.ndarray) -> None:
        mixed = (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(29)
        self._sums = np.append(np.uint64(0), np.cumsum(mixed * _powers(_BASE, len(numbers))))
        self._inverses = _powers(_INVERSE, len(numbers))

    def hashes(self, at: np.ndarray, n: int) -> np.ndarray:
        """The hashes of the n words from each of these positions on."""
        return (self._sums[at + n] - self._sums[at]) * self._inverses[at]


def _powers(base: np.uint64, count: int) -> np.ndarray:
    """base**0, base**1, ... modulo 2**64."""
    factors = np.full(count, base)
    factors[:1] = 1
    return np.cumprod(factors)
