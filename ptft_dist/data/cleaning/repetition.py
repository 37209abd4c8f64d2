"""Repeated lines, paragraphs and n-grams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from ptft_dist.data.cleaning.lines import lines, paragraphs, repeated
from ptft_dist.data.cleaning.text_step import Cleaned
from ptft_dist.data.cleaning.words import is_segmented, words

REPEATED_PARTS = {"lines": (0.30, 0.20), "paragraphs": (0.30, 0.20)}
"""Largest fractions of repeated parts, and of the characters in them."""
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
"""Largest fraction of characters in the most frequent n-gram, by n."""
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Largest fraction of characters in repeated n-grams, by n."""

UNSEGMENTED_FACTOR = 1.5
"""In scripts without spaces n-grams are longer by this factor: a Chinese word has about 1.5 characters."""


class Repetition:
    """Drops texts with much repetition, by the thresholds of Gopher (Rae et al. 2021, table A1).

    The first occurrence of a line, a paragraph or an n-gram is not repeated; later ones are.
    """

    libraries: ClassVar[tuple[str, ...]] = ()
    edits: ClassVar[bool] = False

    def __call__(self, text: str) -> Cleaned:
        for reason in _reasons(text):
            return Cleaned(text, dropped=f"repetition: {reason}")
        return Cleaned(text)


def _reasons(text: str) -> Iterator[str]:
    for name, parts in (("lines", lines(text)), ("paragraphs", paragraphs(text))):
        of_parts, of_characters = repeated(parts)
        most, most_characters = REPEATED_PARTS[name]
        if of_parts > most:
            yield f"more than {most:.0%} of {name} repeated"
        if of_characters > most_characters:
            yield f"more than {most_characters:.0%} of characters in repeated {name}"
    factor = 1.0 if is_segmented(text) else UNSEGMENTED_FACTOR
    top, covered = ({int(factor * n): limit for n, limit in limits.items()} for limits in (TOP_NGRAM, REPEATED_NGRAMS))
    fractions = ngram_fractions(words(text), top, covered)
    for n, fraction in zip((*TOP_NGRAM, *REPEATED_NGRAMS), fractions, strict=False):
        if n in TOP_NGRAM and fraction > TOP_NGRAM[n]:
            yield f"more than {TOP_NGRAM[n]:.0%} of characters in the most frequent {n}-gram"
        if n in REPEATED_NGRAMS and fraction > REPEATED_NGRAMS[n]:
            yield f"more than {REPEATED_NGRAMS[n]:.0%} of characters in repeated {n}-grams"


def ngram_fractions(parts: Sequence[str], top: dict[int, float], covered: dict[int, float]) -> Iterator[float]:
    """For each n of `top`, the fraction of the words' characters in the most frequent n-gram (0 if none is repeated;
    the longest of equally frequent ones). Then for each n of `covered`, the fraction in n-grams that occurred before,
    without counting a character twice.

    Args:
        top, covered: limits by n; all n ascend, from 2 on. The iterator ends where no fraction that follows can be
            above its limit, which is after two or three n in most texts.

    Only n-grams made of two repeated (n-1)-grams can be repeated, so that few are left for larger n.
    """
    numbers = {word: number for number, word in enumerate(dict.fromkeys(parts))}
    if len(numbers) == len(parts):
        return
    ids, size = np.fromiter(map(numbers.__getitem__, parts), np.int64, len(parts)), len(numbers)
    lengths = np.fromiter(map(len, parts), np.int64, len(parts))
    ends = np.append(0, np.cumsum(lengths))
    at = np.flatnonzero(np.bincount(ids)[ids] > 1)
    ids = ids[at]
    for n in range(2, max(covered) + 1):
        pairs = np.flatnonzero(at[1:] == at[:-1] + 1)
        at, keys = at[pairs], ids[pairs] * size + ids[pairs + 1]
        ids, counts, firsts = _numbered(keys)
        repeated = counts[ids] > 1
        if not repeated.any():
            return
        characters = counts * (ends[at[firsts] + n] - ends[at[firsts]])
        if n in top:
            yield float(characters[counts == counts.max()].max() / ends[-1])
        fraction = _covered(at[firsts[ids] != np.arange(len(ids))], n, lengths) / ends[-1]
        if n in covered:
            yield float(fraction)
        # An n-gram for a larger n is covered by some of these, and repeated ones lie within repeated ones of these.
        most = characters[counts > 1].max() / ends[-1]
        if all(-(-larger // n) * most <= limit for larger, limit in top.items() if larger > n) and all(
            fraction <= limit for larger, limit in covered.items() if larger > n
        ):
            return
        at, ids, size = at[repeated], ids[repeated], len(counts)


def _covered(starts: np.ndarray, n: int, lengths: np.ndarray) -> int:
    """The number of characters in the n words from any of these starts on."""
    inside = np.zeros(len(lengths) + 1, np.int64)
    inside[starts] += 1
    inside[starts + n] -= 1
    return lengths[np.cumsum(inside[:-1]) > 0].sum()


def _numbered(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A number from 0 on for each key, equal for equal keys; for each number, the key's count and its first index."""
    order = np.argsort(keys)
    ordered = keys[order]
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))[: len(keys)])
    counts = np.diff(np.append(starts, len(keys)))
    ids = np.empty(len(keys), np.int64)
    ids[order] = np.repeat(np.arange(len(starts)), counts)
    firsts = np.minimum.reduceat(order, starts) if len(keys) else order
    return ids, counts, firsts
