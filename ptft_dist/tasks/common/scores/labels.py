"""Scores of predicted labels and numbers: scikit-learn's and SciPy's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import numpy as np


def classification_scores(gold: Sequence[int], predicted: Sequence[int], labels: int) -> dict[str, float]:
    """accuracy; precision, recall and f1, averaged over labels (macro) and weighted by their frequency (weighted); mcc,
    Matthews' correlation. A label that is never predicted, or never stands there, has precision or recall 0."""
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
        warnings.simplefilter("ignore", UserWarning)  # a single label everywhere has the correlation 0
        return scores | {"mcc": float(metrics.matthews_corrcoef(gold, predicted))}


def multi_label_scores(gold: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Both [N, labels], 0 or 1. accuracy: the share of rows whose labels are all right; precision, recall and f1 over
    all labels together (micro), averaged over labels (macro) and weighted by their frequency (weighted)."""
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
    """pearson, spearman, mse, mae. A correlation with what is constant does not exist, and is shown as 0."""
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
