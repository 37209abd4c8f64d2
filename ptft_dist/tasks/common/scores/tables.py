"""Tables about predicted labels, for `ptft evaluate`: scores of each label, confusion and calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

CALIBRATION_BINS = 15
"""As in Guo et al. 2017."""
SHOWN_LABELS = 100
"""A confusion matrix of more labels is left out."""


def class_table(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and frequency (`support`) of each label, by scikit-learn. A score with a zero denominator
    is 0.

    Args:
        gold, predicted: label ids [N], or 0 and 1 [N, labels].
    """
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(gold, predicted, labels=range(len(labels)), zero_division=0)
    names = ("precision", "recall", "f1", "support")
    return [
        {"label": label, **dict(zip(names, (float(p), float(r), float(f), int(n)), strict=True))}
        for label, p, r, f, n in zip(labels, *columns, strict=True)
    ]


def confusion(gold: np.ndarray, predicted: np.ndarray, labels: Sequence[str]) -> dict[str, Any]:
    """Counts by gold label (rows) and predicted label (columns). gold, predicted: label ids [N]."""
    from sklearn.metrics import confusion_matrix

    counts = confusion_matrix(gold, predicted, labels=range(len(labels)))
    return {"labels": list(labels), "counts": counts.tolist()}


def calibration(confidence: np.ndarray, correct: np.ndarray) -> dict[str, Any]:
    """The expected calibration error: |accuracy - mean confidence| over bins of equal width, weighted by their sizes
    (Guo et al. 2017, equation 3).

    Args:
        confidence: probability of the prediction [N], in [0, 1].
        correct: whether the prediction is right [N].
    """
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    rows = [
        {
            "up_to": (b + 1) / CALIBRATION_BINS,
            "rows": int(inside.sum()),
            "confidence": float(confidence[inside].mean()),
            "accuracy": float(correct[inside].mean()),
        }
        for b in range(CALIBRATION_BINS)
        if (inside := bins == b).any()
    ]
    error = sum(row["rows"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / (len(confidence) or 1)
    return {"ece": error, "bins": rows}
