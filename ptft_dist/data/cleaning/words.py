"""The words of a text: one segmentation for every rule that counts words and for all n-grams.

A word is a run of letters, digits and combining marks. In scripts without spaces between words (Chinese, Japanese, Thai
and so on), each character is a word, with its marks. Punctuation, symbols and emoji belong to no word.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from itertools import pairwise

_UNSPACED = (
    "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46"  # Thai
    "\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf"  # Lao
    "\u0f40-\u0f6c\u0f88-\u0f8c"  # Tibetan
    "\u1000-\u102a\u103f\u1050-\u1055\u105a-\u105d\u1061\u1065\u1066\u106e-\u1070\u1075-\u1081\u108e"  # Myanmar
    "\uaa60-\uaa7a\ua9e0-\ua9e4\ua9e7-\ua9ef\ua9fa-\ua9fe"  # Myanmar, extended
    "\u1780-\u17b3\u17d7\u17dc"  # Khmer
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c"  # marks and numerals of Han and Kana
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f\U0001aff0-\U0001b16f"  # Kana
    "\u3105-\u312f\u31a0-\u31bf"  # Bopomofo
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
)
_RARE = "\U00010000-\U0001afef\U0001b170-\U0001cfff\U0001d400-\U0001efff"
"""Letters, marks and some punctuation of old scripts: many single ranges here would make every match slow."""


def _ranges(codes: Iterable[int]) -> str:
    """Sorted code points as the inside of a character class."""
    codes = list(codes)
    gaps = [(before, after) for before, after in pairwise(codes) if after != before + 1]
    starts, ends = [codes[0], *(after for _, after in gaps)], [*(before for before, _ in gaps), codes[-1]]
    return "".join(f"\\u{start:04x}-\\u{end:04x}" for start, end in zip(starts, ends, strict=True))


def _pattern() -> re.Pattern[str]:
    character = re.compile(f"[{_UNSPACED}]")
    codes = range(0x10000)
    letters = _ranges(code for code in codes if chr(code).isalnum() and not character.match(chr(code)))
    # Variation selectors are marks too, but follow emoji.
    marks = _ranges(c for c in codes if unicodedata.category(chr(c))[0] == "M" and not 0xFE00 <= c <= 0xFE0F)
    return re.compile(f"[{letters}{_RARE}][{letters}{marks}{_RARE}]*|[{_UNSPACED}][{marks}]*")


_CHARACTER = re.compile(f"[{_UNSPACED}]")
_WORD = _pattern()
_START = 2000
"""Characters by which `is_segmented` judges a text."""
_ASCII = str.maketrans({code: " " for code in range(128) if not chr(code).isalnum()})


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    if text.isascii():
        return text.translate(_ASCII).split()  # the same, and much faster
    return _WORD.findall(text)


def folded_words(text: str) -> list[str]:
    """The words without the difference of upper and lower case, for comparisons."""
    return words(text.casefold())


def is_segmented(text: str) -> bool:
    """Whether spaces separate the words of a text: at most half of the words at its start are characters of scripts
    without spaces."""
    if text.isascii():
        return True
    start = text[:_START]
    characters = 2 * len(_CHARACTER.findall(start))
    if characters > len(start):  # there are at most as many words as characters
        return False
    return not characters or characters <= len(words(start))
