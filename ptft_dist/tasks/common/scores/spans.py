"""Exact match and F1 of answers, as in SQuAD's evaluation script, extended to Chinese and Japanese."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

# Scripts written without spaces: kana and ideographs (with extensions and compatibility forms).
_SINGLE_CHARACTER_WORD = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def answer_words(text: str) -> list[str]:
    """Normalize an answer for comparison: lower-case words without punctuation and English articles.

    SQuAD's script removes ASCII punctuation and splits at white space. In addition, each ideograph and each kana
    character is one word, and CJK and full-width punctuation is removed. Other text is normalized as in SQuAD.
    """
    kept = "".join(character for character in text.lower() if not _is_punctuation(character))
    return _SINGLE_CHARACTER_WORD.sub(r" \1 ", _ARTICLES.sub(" ", kept)).split()


def answer_scores(predicted: str, answers: Sequence[str]) -> tuple[float, float]:
    """Exact match and word F1 of a prediction, each the maximum over the gold answers.

    A prediction without words counts as "no answer". It is correct if there is no gold answer, or if no gold answer
    has words.
    """
    predicted_words = answer_words(predicted)
    gold = [words for answer in answers if (words := answer_words(answer))] or [[]]
    return max(float(predicted_words == words) for words in gold), max(_f1(predicted_words, words) for words in gold)


def span_scores(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Exact match and F1, averaged over questions: fractions from 0 to 1 (SQuAD's script prints percentages)."""
    scores = [answer_scores(text, gold) for text, gold in zip(predicted, answers, strict=True)]
    return {
        "exact_match": sum(exact for exact, _ in scores) / (len(scores) or 1),
        "f1": sum(f1 for _, f1 in scores) / (len(scores) or 1),
    }


def _f1(predicted: list[str], gold: list[str]) -> float:
    if not predicted or not gold:
        return float(predicted == gold)
    common = (Counter(predicted) & Counter(gold)).total()
    return 2 * common / (len(predicted) + len(gold))


def _is_punctuation(character: str) -> bool:
    if character in string.punctuation:
        return True
    wide = "\u3000" <= character <= "\u303f" or "\uff00" <= character <= "\uffef"
    return wide and unicodedata.category(character).startswith("P")
