"""Repeated lines, paragraphs and n-grams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import ClassVar

from ptft_dist.data.cleaning.lines import lines, paragraphs, repeated
from ptft_dist.data.cleaning.text_step import Cleaned
from ptft_dist.data.cleaning.words import words

REPEATED_PARTS = {"lines": (0.30, 0.20), "paragraphs": (0.30, 0.20)}
"""Largest fractions of repeated parts, and of the characters in them."""
TOP_NGRAM = {2: 0.20, 3: 0.18, 4: 0.16}
"""Largest fraction of characters in the most frequent n-gram, by n."""
REPEATED_NGRAMS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Largest fraction of characters in repeated n-grams, by n."""


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
    for size, fraction in ngram_fractions(words(text)):
        if size in TOP_NGRAM and fraction > TOP_NGRAM[size]:
            yield f"more than {TOP_NGRAM[size]:.0%} of characters in the most frequent {size}-gram"
        if size in REPEATED_NGRAMS and fraction > REPEATED_NGRAMS[size]:
            yield f"more than {REPEATED_NGRAMS[size]:.0%} of characters in repeated {size}-grams"


def ngram_fractions(words_of_text: Sequence[str]) -> Iterator[tuple[int, float]]:
    """For n = 2 to 4, n and the fraction of the words' characters in the most frequent n-gram (0 if none is repeated;
    the longest of equally frequent ones); for n = 5 to 10, n and the fraction in repeated n-grams, without
    counting a character twice.

    Only n-grams made of two repeated (n-1)-grams can be repeated, so that few are left for larger n.
    """
    ends = [0, *accumulate(map(len, words_of_text))]
    numbers: dict[str, int] = {}
    ids = [numbers.setdefault(word, len(numbers)) for word in words_of_text]
    keys = dict(enumerate([first * len(numbers) + second for first, second in zip(ids, ids[1:], strict=False)]))
    for size in range(2, max(REPEATED_NGRAMS) + 1):
        counts = Counter(keys.values())
        numbers_of_repeated = {key: number for number, key in enumerate(k for k, count in counts.items() if count > 1)}
        repeated_at = {at: numbers_of_repeated[key] for at, key in keys.items() if key in numbers_of_repeated}
        if size in TOP_NGRAM:
            yield size, _top(size, keys, counts, repeated_at, ends)
        else:
            yield size, _covered(size, repeated_at, ends)
        keys = {
            at: number * len(repeated_at) + after
            for at, number in repeated_at.items()
            if (after := repeated_at.get(at + 1)) is not None
        }


def _top(size: int, keys: dict[int, int], counts: Counter[int], repeated_at: dict[int, int], ends: list[int]) -> float:
    if not repeated_at:
        return 0.0
    most = max(counts.values())
    longest = max(ends[at + size] - ends[at] for at in repeated_at if counts[keys[at]] == most)
    return most * longest / ends[-1]


def _covered(size: int, repeated_at: dict[int, int], ends: list[int]) -> float:
    """The fraction of characters in n-grams that occurred before."""
    seen: set[int] = set()
    covered = last = 0
    for at, number in repeated_at.items():  # in order
        if number in seen:
            covered += ends[at + size] - ends[max(at, last)]
            last = at + size
        seen.add(number)
    return covered / ends[-1] if covered else 0.0
