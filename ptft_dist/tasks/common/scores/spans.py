"""Scores of answers, as SQuAD's evaluation defines them, and in the same spirit for scripts without spaces."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

# Characters of scripts that are written without spaces: kana, ideographs (with extensions and compatibility forms).
_ALONE = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def answer_words(text: str) -> list[str]:
    """What of an answer is compared: its words in lower case, without punctuation and English articles.

    SQuAD removes ASCII punctuation and divides at spaces. Beyond it, for Chinese and Japanese: ideographs and kana are
    words of their own, and CJK and full-width punctuation is removed too. Other text comes out as SQuAD has it.
    """
    kept = "".join(character for character in text.lower() if not _is_punctuation(character))
    return _ALONE.sub(r" \1 ", _ARTICLES.sub(" ", kept)).split()


def answer_scores(predicted: str, answers: Sequence[str]) -> tuple[float, float]:
    """exact_match and f1 of words, each the best over the right answers. No answer (an empty text, or no words left) is
    right where there is none, and where all answers are without words."""
    ours = answer_words(predicted)
    right = [words for answer in answers if (words := answer_words(answer))] or [[]]
    return max(float(ours == words) for words in right), max(_f1(ours, words) for words in right)


def span_scores(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """exact_match and f1 averaged over questions, as shares (0 to 1; SQuAD's own program prints percent)."""
    each = [answer_scores(text, right) for text, right in zip(predicted, answers, strict=True)]
    return {
        "exact_match": sum(exact for exact, _ in each) / (len(each) or 1),
        "f1": sum(f1 for _, f1 in each) / (len(each) or 1),
    }


def _f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def _is_punctuation(character: str) -> bool:
    if character in string.punctuation:
        return True
    wide = "\u3000" <= character <= "\u303f" or "\uff00" <= character <= "\uffef"
    return wide and unicodedata.category(character).startswith("P")
