"""Scores of generated texts, each against one reference, computed by sacrebleu and rouge_score."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from ptft_dist.tasks.common.generation_settings import ROUGE, GenerationSettings

# Scripts without spaces between words: iteration marks, kana, Han.
_SPACELESS = [(0x3005, 0x3007), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF)]
_SPACELESS += [(0xF900, 0xFAFF), (0xFF66, 0xFF9D), (0x20000, 0x3FFFF)]
_SPACELESS_CHARACTER = re.compile("[" + "".join(f"{chr(first)}-{chr(last)}" for first, last in _SPACELESS) + "]")


def text_scores(
    predictions: Sequence[str], references: Sequence[str], settings: GenerationSettings
) -> dict[str, float]:
    """Score the generated texts with the metrics of the settings.

    exact_match: fraction of texts equal to their reference, ignoring white space at both ends. bleu and chrf: corpus
    scores, 0 to 100. rouge1, rouge2 and rougeL: F1 averaged over texts, 0 to 1.
    """
    import sacrebleu

    predictions, references = list(predictions), list(references)
    scores: dict[str, float] = {}
    for metric in settings.metrics:
        if metric == "exact_match":
            matches = sum(a.strip() == b.strip() for a, b in zip(predictions, references, strict=True))
            scores[metric] = matches / len(predictions)
        elif metric == "bleu":
            bleu = sacrebleu.corpus_bleu(predictions, [references], tokenize=settings.bleu_tokenize or "13a")
            scores[metric] = bleu.score
        elif metric == "chrf":
            scores[metric] = sacrebleu.corpus_chrf(predictions, [references]).score
        else:
            scores |= rouge(predictions, references)
    return scores


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004) without stemming, averaged over texts."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, tokenizer=Words())
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}


class Words:
    """A tokenizer for rouge_score that supports all scripts.

    rouge_score's own tokenizer keeps a-z and 0-9 only: it removes Chinese text and splits German words at umlauts.
    Here a word is a lower-case run of letters, digits and combining marks, and each Chinese or Japanese character is
    one word. Both give the same words for ASCII text.
    """

    def tokenize(self, text: str) -> list[str]:
        lower = unicodedata.normalize("NFC", text).lower()
        return "".join(map(_spaced, lower)).split()


def count_words(text: str) -> int:
    """The number of words: runs of characters without white space, and each Chinese or Japanese character."""
    return sum(len(_SPACELESS_CHARACTER.sub(" x ", part).split()) for part in text.split())


def _spaced(character: str) -> str:
    if unicodedata.category(character)[0] not in "LNM":
        return " "
    is_word = any(first <= ord(character) <= last for first, last in _SPACELESS)
    return f" {character} " if is_word else character
