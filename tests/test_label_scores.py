"""Scores of labels and numbers in special cases, computed by hand."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from ptft_dist.tasks.common.scores.labels import classification_scores, multi_label_scores, regression_scores

CASES = {
    "ordinary": ([0, 1, 2, 1, 0, 2, 2], [0, 2, 2, 1, 1, 2, 0], 3),
    "a label that is never there": ([0, 0, 1, 1], [0, 1, 1, 1], 3),
    "a label that is only predicted": ([0, 0, 1, 1], [0, 2, 1, 2], 3),
    "a constant prediction": ([0, 1, 2, 0], [0, 0, 0, 0], 3),
    "one row, right": ([1], [1], 2),
    "one row, wrong": ([1], [0], 2),
    "all right": ([0, 1, 2], [0, 1, 2], 3),
}


@pytest.mark.parametrize("case", CASES)
def test_one_label_a_row(case: str) -> None:
    gold, predicted, labels = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a run's terminal is not the place for scikit-learn's remarks
        found = classification_scores(gold, predicted, labels)
    right = sum(a == b for a, b in zip(gold, predicted, strict=True))
    assert found["accuracy"] == pytest.approx(right / len(gold))
    precisions, recalls, f1s, weights = [], [], [], []
    for label in range(labels):  # by hand
        both = sum(a == b == label for a, b in zip(gold, predicted, strict=True))
        said, there = predicted.count(label), gold.count(label)
        precisions.append(both / said if said else 0.0)
        recalls.append(both / there if there else 0.0)
        f1s.append(2 * both / (said + there) if said + there else 0.0)
        weights.append(there / len(gold))
    for name, values in (("precision", precisions), ("recall", recalls), ("f1", f1s)):
        assert found[f"{name}_macro"] == pytest.approx(sum(values) / labels)
        assert found[f"{name}_weighted"] == pytest.approx(float(np.dot(values, weights)))
    assert found["mcc"] == pytest.approx(_matthews(gold, predicted, labels))


def _matthews(gold: list[int], predicted: list[int], labels: int) -> float:
    """Gorodkin 2004, computed from counts; 0 if undefined."""
    total, right = len(gold), sum(a == b for a, b in zip(gold, predicted, strict=True))
    there, said = [gold.count(k) for k in range(labels)], [predicted.count(k) for k in range(labels)]
    over = right * total - sum(a * b for a, b in zip(there, said, strict=True))
    under = math.sqrt((total**2 - sum(x * x for x in said)) * (total**2 - sum(x * x for x in there)))
    return over / under if under else 0.0


MULTI = {
    "ordinary": ([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1]], [[1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 1, 1]]),
    "nothing is there": ([[0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]]),
    "nothing is predicted": ([[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 0]]),
    "one row": ([[1, 0, 1]], [[1, 0, 1]]),
}


@pytest.mark.parametrize("case", MULTI)
def test_several_labels_a_row(case: str) -> None:
    gold, predicted = (np.array(each) for each in MULTI[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = multi_label_scores(gold, predicted)
    assert found["accuracy"] == pytest.approx(
        sum((a == b).all() for a, b in zip(gold, predicted, strict=True)) / len(gold)
    )
    both, said, there = (gold & predicted).sum(0), predicted.sum(0), gold.sum(0)  # of each label
    for name, above, below in (("precision", both, said), ("recall", both, there), ("f1", 2 * both, said + there)):
        scores = [float(a / b) if b else 0.0 for a, b in zip(above, below, strict=True)]
        weighted = sum(x * weight for x, weight in zip(scores, there, strict=True)) / max(1, there.sum())
        assert found[f"{name}_micro"] == pytest.approx(above.sum() / below.sum() if below.sum() else 0.0), name
        assert found[f"{name}_macro"] == pytest.approx(sum(scores) / len(scores)), name
        assert found[f"{name}_weighted"] == pytest.approx(weighted), name


def test_numbers() -> None:
    gold, said = [1.0, 2.0, 3.0, 5.0], [1.5, 1.0, 4.0, 4.5]
    found = regression_scores(gold, said)
    assert found["mse"] == pytest.approx((0.25 + 1 + 1 + 0.25) / 4)
    assert found["mae"] == pytest.approx((0.5 + 1 + 1 + 0.5) / 4)
    assert found["pearson"] == pytest.approx(float(np.corrcoef(gold, said)[0, 1]))
    ranks = [[1, 2, 3, 4], [2, 1, 3, 4]]
    assert found["spearman"] == pytest.approx(float(np.corrcoef(ranks)[0, 1]))


@pytest.mark.parametrize(
    ("gold", "said"),
    [([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]), ([2.0, 2.0], [1.0, 3.0]), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 1.0])],
)
def test_a_correlation_that_does_not_exist_is_zero(gold: list[float], said: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = regression_scores(gold, said)
    assert found["pearson"] == found["spearman"] == 0
    assert found["mae"] == pytest.approx(sum(abs(a - b) for a, b in zip(gold, said, strict=True)) / len(gold))


def test_ties_have_the_mean_of_their_ranks() -> None:
    found = regression_scores([1.0, 1.0, 2.0, 3.0], [4.0, 5.0, 5.0, 9.0])
    assert found["spearman"] == pytest.approx(float(np.corrcoef([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4])[0, 1]))
