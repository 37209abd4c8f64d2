"""Scores of written texts against one reference each: sacrebleu's and rouge_score's."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from ptft_dist.tasks.common.generation_settings import ROUGE, GenerationSettings

# Scripts that put no spaces between words: iteration marks, kana, Han.
_SPACELESS = [(0x3005, 0x3007), (0x3040, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF)]
_SPACELESS += [(0xF900, 0xFAFF), (0xFF66, 0xFF9D), (0x20000, 0x3FFFF)]


def text_scores(
    predictions: Sequence[str], references: Sequence[str], settings: GenerationSettings
) -> dict[str, float]:
    """exact_match: the share of texts that are their reference, but for white space around them; bleu and chrf of the
    whole corpus, 0 to 100; rouge1, rouge2, rougeL: F1, averaged over texts, 0 to 1."""
    import sacrebleu

    theirs, ours = list(references), list(predictions)
    scores: dict[str, float] = {}
    for metric in settings.metrics:
        if metric == "exact_match":
            scores[metric] = sum(a.strip() == b.strip() for a, b in zip(ours, theirs, strict=True)) / len(ours)
        elif metric == "bleu":
            scores[metric] = sacrebleu.corpus_bleu(ours, [theirs], tokenize=settings.bleu_tokenize or "13a").score
        elif metric == "chrf":
            scores[metric] = sacrebleu.corpus_chrf(ours, [theirs]).score
        else:
            scores |= rouge(ours, theirs)
    return scores


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """F1 of ROUGE-1, -2 and -L (Lin 2004), averaged over texts, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, tokenizer=Words())
    each = [scorer.score(b, a) for a, b in zip(predictions, references, strict=True)]
    return {name: sum(found[name].fmeasure for found in each) / len(each) for name in ROUGE}


class Words:
    """rouge_score's tokenizer for every script. Its own keeps nothing but a-z and 0-9: of Chinese nothing is left, and
    of German words the pieces between umlauts. Here a word is a run of letters, digits and the marks on them, in lower
    case, and each Chinese or Japanese character one by itself. For ASCII text the two are the same."""

    def tokenize(self, text: str) -> list[str]:
        lower = unicodedata.normalize("NFC", text).lower()
        return "".join(map(_spaced, lower)).split()


def _spaced(character: str) -> str:
    if unicodedata.category(character)[0] not in "LNM":
        return " "
    alone = any(first <= ord(character) <= last for first, last in _SPACELESS)
    return f" {character} " if alone else character
