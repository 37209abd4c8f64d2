"""Classification of texts, pairs of texts and relations: one label a row, or any number of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.labelled_text import LabelledTextTask
from ptft_dist.tasks.common.scores.labels import classification_scores, multi_label_scores
from ptft_dist.tasks.protocol import IGNORE, Batch, LossOut, TaskSetup


class Classification(LabelledTextTask):
    """Rows of token ids in; the summed cross-entropy of labels out, or of each label's yes or no (multi_label)."""

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.labels = list(setup.survey["labels"])
        self.weights = label_weights(setup)  # fp32 [labels], or None

    @classmethod
    def config_settings(cls, setup: TaskSetup) -> dict[str, Any]:
        label_weights(setup)  # raises RecipeError for weights that cannot be
        labels = setup.survey["labels"]
        kind = "multi_label_classification" if setup.settings.multi_label else "single_label_classification"
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": kind,
        }

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """targets: label ids [B]; or, multi_label, fp32 [B, labels], 1 for the row's labels. The count is the number of
        rows, of their label weights, or of yes-or-no decisions."""
        inputs = self.text_inputs(rows)
        tokens = sum(len(row.input_ids) for row in rows)
        if self.settings.multi_label:
            targets = np.zeros((len(rows), len(self.labels)), np.float32)
            for i, row in enumerate(rows):
                targets[i, row.columns["labels"]] = 1
            return Batch({**inputs, "targets": torch.from_numpy(targets)}, targets.size, tokens)
        ids = torch.tensor([int(row.columns["labels"][0]) for row in rows])
        count = len(rows) if self.weights is None else float(self.weights[ids].double().sum())
        return Batch({**inputs, "targets": ids}, count, tokens)

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        logits, targets = self.choices(model, inputs)
        if self.settings.multi_label:
            there = ~targets.isnan().any(1)
            right = ((logits > 0) == (targets > 0)).all(1) & there
        else:
            there = targets != IGNORE
            right = (logits.argmax(-1) == targets) & there
        loss_sum, _ = self.loss_of(logits, targets)
        return LossOut(loss_sum, {"accuracy": (right.sum(), there.sum())}, logits.detach())

    def choices(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, labels] and targets: ids [B], or a yes or no for each label [B, labels]."""
        return self.logits(model, inputs), inputs["targets"]

    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss, and what it is averaged over."""
        weights = None if self.weights is None else self.weights.to(logits.device)
        if self.settings.multi_label:
            there = ~targets.isnan()
            each = F.binary_cross_entropy_with_logits(
                logits, targets.nan_to_num(), pos_weight=weights, reduction="none"
            )
            return (each * there).sum(), there.sum()
        loss_sum = weighted_cross_entropy(logits, targets, weights, self.settings.label_smoothing)
        there = targets != IGNORE
        return loss_sum, there.sum() if weights is None else (weights[targets.clamp(min=0)] * there).sum()

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        return {"loss": totals["loss"]}

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """predictions: each row's logits."""
        logits = np.array(list(predictions.values()))
        if self.settings.multi_label:
            gold = np.zeros(logits.shape, np.int64)
            for i, number in enumerate(predictions):
                gold[i, row(number).columns["labels"]] = 1
            return multi_label_scores(gold, (logits > 0).astype(np.int64)), []
        answers = [int(row(number).columns["labels"][0]) for number in predictions]
        return classification_scores(answers, logits.argmax(-1).tolist(), len(self.labels)), []


def weighted_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, smoothing: float
) -> torch.Tensor:
    """Summed over rows: PyTorch's cross_entropy before it divides by the weights of the targets."""
    return F.cross_entropy(logits, targets, weights, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)


def label_weights(setup: TaskSetup) -> torch.Tensor | None:
    """fp32 [labels]. Balanced, as scikit-learn has it: rows / (labels x rows of the label); for yes-or-no decisions
    the weight of a yes: rows without the label / rows with it.

    Raises:
        RecipeError: the weights are not those of the data's labels, or a label cannot be balanced.
    """
    settings, survey = setup.settings, setup.survey
    labels = survey["labels"]
    if settings.class_weights is None:
        return None
    if settings.class_weights != "balanced":
        if strange := sorted(set(settings.class_weights) ^ set(labels)):
            raise RecipeError(
                f"classification.class_weights: the labels of the data are {', '.join(labels)}, each of which needs a "
                f"weight, and no other; what differs: {', '.join(strange)}"
            )
        return torch.tensor([settings.class_weights[label] for label in labels], dtype=torch.float32)
    for label, frequency in zip(labels, survey["frequencies"], strict=True):
        everywhere = settings.multi_label and frequency == survey["rows"]
        if not frequency or everywhere:
            raise RecipeError(
                f"classification.class_weights: balanced; {'every' if everywhere else 'no'} training row has the label "
                f"{label!r}. Give the weights by name, or leave the label out."
            )
    frequencies = torch.tensor(survey["frequencies"], dtype=torch.float64)
    if settings.multi_label:
        return ((survey["rows"] - frequencies) / frequencies).float()
    return (frequencies.sum() / (len(frequencies) * frequencies)).float()
