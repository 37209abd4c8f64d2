"""Answers with one label of several: from scores, beside the reference, and in tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ptft_dist.tasks.common.scores.tables import SHOWN_LABELS, calibration, class_table, confusion
from ptft_dist.tasks.protocol import Judged


def label_answer(scores: Sequence[float], labels: Sequence[str]) -> dict[str, Any]:
    """The label with the largest score, and the probability of every label: the softmax of the scores [labels]."""
    logits = torch.tensor(scores, dtype=torch.float64)
    return {
        "label": labels[int(logits.argmax())],
        "probabilities": dict(zip(labels, logits.softmax(0).tolist(), strict=True)),
    }


def judged_label(answer: Mapping[str, Any], reference: str) -> Judged:
    """The answer beside the name of the right label."""
    return Judged(answer, reference, {"accuracy": (answer["label"] == reference, 1)})


def label_tables(judged: Sequence[Judged], labels: Sequence[str]) -> dict[str, Any]:
    """Scores of each label, the confusion of labels, and the calibration."""
    ids = {label: i for i, label in enumerate(labels)}
    shares = np.array([list(each.answer["probabilities"].values()) for each in judged])
    gold = np.array([ids[each.reference] for each in judged])
    predicted = np.array([ids[each.answer["label"]] for each in judged])
    tables: dict[str, Any] = {"labels": class_table(gold, predicted, labels)}
    if len(ids) <= SHOWN_LABELS:
        tables["confusion"] = confusion(gold, predicted, labels)
    return {**tables, "calibration": calibration(shares.max(1), gold == predicted)}
