"""Scores of predicted labels and numbers, computed by scikit-learn and SciPy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np


def classification_scores(gold: Sequence[int], predicted: Sequence[int], labels: int) -> dict[str, float]:
    """Accuracy, precision, recall and F1 (macro and weighted averages), and Matthews' correlation coefficient (mcc).

    A label that is never predicted has precision 0. A label that never occurs in `gold` has recall 0.

    Args:
        gold, predicted: label ids [N].
        labels: number of labels.
    """
    from sklearn import metrics

    ids = list(range(labels))
    scores = {"accuracy": float(metrics.accuracy_score(gold, predicted))}
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            gold, predicted, labels=ids, average=average, zero_division=0
        )
        scores |= {f"precision_{average}": float(precision), f"recall_{average}": float(recall)}
        scores[f"f1_{average}"] = float(f1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # raised if only one label occurs; the coefficient is then 0
        return scores | {"mcc": float(metrics.matthews_corrcoef(gold, predicted))}


def multi_label_scores(gold: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Multi-label scores: subset accuracy, and precision, recall and F1 (micro, macro and weighted averages).

    Subset accuracy is the fraction of rows whose labels are all correct.

    Args:
        gold, predicted: 0 or 1 [N, labels].
    """
    from sklearn import metrics

    scores = {"accuracy": float(metrics.accuracy_score(gold, predicted))}
    for average in ("micro", "macro", "weighted"):
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            gold, predicted, average=average, zero_division=0
        )
        scores |= {f"precision_{average}": float(precision), f"recall_{average}": float(recall)}
        scores[f"f1_{average}"] = float(f1)
    return scores


def regression_scores(gold: Sequence[float], predicted: Sequence[float]) -> dict[str, float]:
    """Pearson and Spearman correlation, mean squared error and mean absolute error.

    A correlation with constant values is undefined and reported as 0.

    Args:
        gold, predicted: numbers [N].
    """
    from scipy import stats
    from sklearn import metrics

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        pearson = stats.pearsonr(gold, predicted).statistic if len(gold) > 1 else 0.0
        spearman = stats.spearmanr(gold, predicted).statistic if len(gold) > 1 else 0.0
    return {
        "pearson": 0.0 if math.isnan(pearson) else float(pearson),
        "spearman": 0.0 if math.isnan(spearman) else float(spearman),
        "mse": float(metrics.mean_squared_error(gold, predicted)),
        "mae": float(metrics.mean_absolute_error(gold, predicted)),
    }
