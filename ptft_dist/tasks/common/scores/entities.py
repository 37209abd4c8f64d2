"""Entity-level precision, recall and F1, as conlleval (CoNLL-2000) and seqeval's default mode compute them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

AVERAGES = ("micro", "macro", "weighted")


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Extract the entities of a sentence as (type, first word, last word).

    Predicted tags may violate their scheme, so one lenient rule reads IOB1, IOB2, BIOES, BMES and BILOU: I-, M-, E- or
    L- continues the previous entity if the previous tag is B-, I- or M- of the same type. Every other tag except O
    begins an entity.
    """
    spans: list[tuple[str, int, int]] = []
    previous_prefix, previous_type = "O", ""
    for i, tag in enumerate(tags):
        prefix, _, entity_type = tag.partition("-")
        if prefix in ("I", "M", "E", "L") and previous_prefix in ("B", "I", "M") and entity_type == previous_type:
            spans[-1] = (entity_type, spans[-1][1], i)
        elif prefix != "O":
            spans.append((entity_type, i, i))
        previous_prefix, previous_type = prefix, entity_type
    return set(spans)


def entity_scores(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Word accuracy and entity-level precision, recall and F1.

    An entity is correct if its type, start and end are correct. The averages are `micro` (over all entities), `macro`
    (over types) and `weighted` (over types, weighted by their frequency in `gold`). A score with a zero denominator
    is 0.

    Args:
        gold, predicted: the tags of each sentence. Corresponding sentences have the same length.
    """
    correct, expected, claimed = _counts(gold, predicted)
    pairs = list(zip(gold, predicted, strict=True))
    words = sum(len(tags) for tags, _ in pairs)
    correct_words = sum(a == b for tags, others in pairs for a, b in zip(tags, others, strict=True))
    types = sorted(expected | claimed)
    by_type = [_scores(correct[name], claimed[name], expected[name]) for name in types]
    averages = {
        "micro": _scores(correct.total(), claimed.total(), expected.total()),
        "macro": _mean(by_type, [1] * len(by_type)),
        "weighted": _mean(by_type, [expected[name] for name in types]),
    }
    scores = {"accuracy": correct_words / words if words else 0.0}
    for average in AVERAGES:
        scores |= dict(zip(score_names(average), averages[average], strict=True))
    return scores


def entity_table(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and frequency in `gold` (`support`) of each type. Arguments as of `entity_scores`."""
    correct, expected, claimed = _counts(gold, predicted)
    names = ("precision", "recall", "f1")
    return [
        {
            "label": name,
            **dict(zip(names, _scores(correct[name], claimed[name], expected[name]), strict=True)),
            "support": expected[name],
        }
        for name in sorted(expected | claimed)
    ]


def _counts(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]
) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """By type, the numbers of correct, gold and predicted entities."""
    correct, expected, claimed = Counter[str](), Counter[str](), Counter[str]()
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        gold_entities, predicted_entities = entities(gold_tags), entities(predicted_tags)
        correct.update(entity_type for entity_type, _, _ in gold_entities & predicted_entities)
        expected.update(entity_type for entity_type, _, _ in gold_entities)
        claimed.update(entity_type for entity_type, _, _ in predicted_entities)
    return correct, expected, claimed


def score_names(average: str) -> tuple[str, str, str]:
    return f"precision_{average}", f"recall_{average}", f"f1_{average}"


def _scores(correct: int, claimed: int, expected: int) -> tuple[float, float, float]:
    """Precision, recall and F1 from the numbers of correct, predicted and gold entities."""
    precision, recall = correct / (claimed or 1), correct / (expected or 1)
    return precision, recall, 2 * precision * recall / (precision + recall) if correct else 0.0


def _mean(by_type: Sequence[tuple[float, float, float]], weights: Sequence[int]) -> tuple[float, float, float]:
    """Weighted mean of (precision, recall, F1) over types."""
    total = sum(weights) or 1
    a, b, c = (sum(scores[i] * w for scores, w in zip(by_type, weights, strict=True)) / total for i in range(3))
    return a, b, c
