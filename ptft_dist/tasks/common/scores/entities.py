"""Scores of predicted entities, by the definition of CoNLL's conlleval, which is seqeval's default."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

AVERAGES = ("micro", "macro", "weighted")


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, last word) of each entity in a sentence; tags in IOB1, IOB2 or BIOES.

    All three are read by one lenient rule, for what a network predicts may break its scheme: a tag goes on with the
    entity before it if it is I- or E- of the same type, and the tag before it is B- or I-. Any other tag but O begins
    an entity.
    """
    found: list[tuple[str, int, int]] = []
    before, kind_before = "O", ""
    for i, tag in enumerate(tags):
        letter, _, kind = tag.partition("-")
        if letter in ("I", "E") and before in ("B", "I") and kind == kind_before:
            found[-1] = (kind, found[-1][1], i)
        elif letter != "O":
            found.append((kind, i, i))
        before, kind_before = letter, kind
    return set(found)


def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Tags of sentences, as long as each other. accuracy: the share of words with the right tag. precision, recall and
    f1: of entities whose type, beginning and end are all right; over all of them (micro), averaged over types (macro)
    and weighted by the types' frequency (weighted). What cannot be divided, for there is nothing, is 0."""
    right: Counter[str] = Counter()
    there: Counter[str] = Counter()
    claimed: Counter[str] = Counter()
    words = right_words = 0
    for theirs, ours in zip(gold, predicted, strict=True):
        expected, found = entities(theirs), entities(ours)
        right.update(kind for kind, _, _ in expected & found)
        there.update(kind for kind, _, _ in expected)
        claimed.update(kind for kind, _, _ in found)
        words += len(theirs)
        right_words += sum(a == b for a, b in zip(theirs, ours, strict=True))
    kinds = sorted(there | claimed)
    each = [_scores(right[kind], claimed[kind], there[kind]) for kind in kinds]
    weights = [there[kind] for kind in kinds]
    averages = {
        "micro": _scores(right.total(), claimed.total(), there.total()),
        "macro": _mean(each, [1] * len(each)),
        "weighted": _mean(each, weights),
    }
    scores = {"accuracy": right_words / words if words else 0.0}
    for average in AVERAGES:
        scores |= dict(zip(score_names(average), averages[average], strict=True))
    return scores


def score_names(average: str) -> tuple[str, str, str]:
    return f"precision_{average}", f"recall_{average}", f"f1_{average}"


def _scores(right: int, claimed: int, there: int) -> tuple[float, float, float]:
    """Precision, recall and f1 of so many right ones among those claimed and those that are there."""
    precision, recall = right / (claimed or 1), right / (there or 1)
    return precision, recall, 2 * precision * recall / (precision + recall) if right else 0.0


def _mean(each: Sequence[tuple[float, float, float]], weights: Sequence[int]) -> tuple[float, float, float]:
    total = sum(weights) or 1
    a, b, c = (sum(scores[i] * w for scores, w in zip(each, weights, strict=True)) / total for i in range(3))
    return a, b, c
