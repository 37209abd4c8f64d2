"""Classification of texts, pairs of texts and relations, with one label per row or multi-label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.label_answers import judged_label, label_answer, label_tables
from ptft_dist.tasks.common.labelled_text import LabelledTextTask
from ptft_dist.tasks.common.scores.labels import classification_scores, multi_label_scores
from ptft_dist.tasks.common.scores.tables import calibration, class_table
from ptft_dist.tasks.protocol import IGNORE, Batch, Judged, LossOut, TaskSetup


class Classification(LabelledTextTask):
    """Rows of token ids -> summed cross-entropy of the labels; with multi_label, summed binary cross-entropy."""

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.labels = list(setup.survey["labels"])
        self.weights = label_weights(setup)  # fp32 [labels], or None

    @classmethod
    def config_settings(cls, setup: TaskSetup) -> dict[str, Any]:
        label_weights(setup)  # raises RecipeError for invalid weights before the network is built
        labels = setup.survey["labels"]
        multi_label = setup.settings.multi_label
        return {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
            "problem_type": "multi_label_classification" if multi_label else "single_label_classification",
        }

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """Pad texts and add targets: label ids [B]; with multi_label fp32 [B, labels], 1 for the row's labels.

        The count is the number of rows, the sum of their label weights, or with multi_label B x labels.
        """
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
            mask = ~targets.isnan().any(1)  # NaN: a row of a dummy batch
            correct = ((logits > 0) == (targets > 0)).all(1) & mask
        else:
            mask = targets != IGNORE
            correct = (logits.argmax(-1) == targets) & mask
        loss_sum, _ = self.loss_of(logits, targets)
        return LossOut(loss_sum, {"accuracy": (correct.sum(), mask.sum())}, logits.detach())

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        out, targets = self.loss(model, inputs), inputs["targets"]
        assert out.predictions is not None
        losses, counts = self._losses(out.predictions, targets)
        return out._replace(row_losses=torch.stack([losses.flatten(1).sum(1), counts.flatten(1).sum(1)], 1))

    def choices(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, labels] and targets: label ids [B]; with multi_label 0 or 1 [B, labels]."""
        return self.logits(model, inputs), inputs["targets"]

    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed loss, and the denominator of its mean."""
        losses, counts = self._losses(logits, targets)
        return losses.sum(), counts.sum()

    def _losses(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and denominators: [B, 1]; with multi_label [B, labels]."""
        weights = None if self.weights is None else self.weights.to(logits.device)
        if self.settings.multi_label:
            mask = ~targets.isnan()
            losses = F.binary_cross_entropy_with_logits(
                logits, targets.nan_to_num(), pos_weight=weights, reduction="none"
            )
            return losses * mask, mask.float()
        losses = weighted_cross_entropy(logits, targets, weights, self.settings.label_smoothing)
        mask = targets != IGNORE
        counts = mask.float() if weights is None else weights[targets.clamp(min=0)] * mask
        return losses[:, None], counts[:, None]

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        return {"loss": totals["loss"]}

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Scores over all validation rows. predictions: row number -> logits [labels]."""
        logits = np.array(list(predictions.values()))
        if self.settings.multi_label:
            gold = np.zeros(logits.shape, np.int64)
            for i, number in enumerate(predictions):
                gold[i, row(number).columns["labels"]] = 1
            return multi_label_scores(gold, (logits > 0).astype(np.int64)), []
        gold_ids = [int(row(number).columns["labels"][0]) for number in predictions]
        return classification_scores(gold_ids, logits.argmax(-1).tolist(), len(self.labels)), []

    def answer(self, predictions: Sequence[Any], rows: Sequence[Row]) -> Mapping[str, Any]:  # noqa: ARG002
        """The label (with multi_label: labels), and the probability of every label."""
        if not self.settings.multi_label:
            return label_answer(predictions[0], self.labels)
        logits = torch.tensor(predictions[0], dtype=torch.float64)
        chosen = [label for label, logit in zip(self.labels, logits.tolist(), strict=True) if logit > 0]
        probabilities = dict(zip(self.labels, logits.sigmoid().tolist(), strict=True))
        return {"labels": chosen, "probabilities": probabilities}

    def judge(self, answer: Mapping[str, Any], rows: Sequence[Row]) -> Judged:
        names = rows[0].meta["label"]
        if self.settings.multi_label:
            return Judged(answer, names, {"accuracy": (set(answer["labels"]) == set(names), 1)})
        return judged_label(answer, names[0])

    def details(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """Scores of each label, the confusion of labels (not with multi_label), and the calibration.

        With multi_label, the calibration is over all decisions on a label.
        """
        if not self.settings.multi_label:
            return label_tables(judged, self.labels)
        shares = np.array([list(each.answer["probabilities"].values()) for each in judged])
        gold = np.array([[label in each.reference for label in self.labels] for each in judged], int)
        predicted = np.array([[label in each.answer["labels"] for label in self.labels] for each in judged], int)
        certainty = np.maximum(shares, 1 - shares)
        return {
            "labels": class_table(gold, predicted, self.labels),
            "calibration": calibration(certainty.ravel(), (gold == predicted).ravel()),
        }


def weighted_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor | None, smoothing: float
) -> torch.Tensor:
    """PyTorch's weighted cross_entropy of each row, before the division by the sum of the targets' weights: [B]."""
    return F.cross_entropy(logits, targets, weights, ignore_index=IGNORE, reduction="none", label_smoothing=smoothing)


def label_weights(setup: TaskSetup) -> torch.Tensor | None:
    """The label weights of classification.class_weights: fp32 [labels]; None without weights.

    `balanced` is computed as in scikit-learn: rows / (labels x rows with the label). With multi_label it is the weight
    of positive labels: rows without the label / rows with the label.

    Raises:
        RecipeError: the named labels differ from those of the data, or no or every training row has a label.
    """
    settings, survey = setup.settings, setup.survey
    labels = survey["labels"]
    if settings.class_weights is None:
        return None
    if settings.class_weights != "balanced":
        if different := sorted(set(settings.class_weights) ^ set(labels)):
            raise RecipeError(
                "classification.class_weights: the weights and the data do not have the same labels; only one of them "
                f"has: {', '.join(different)}. Give one weight for each label of the data: {', '.join(labels)}"
            )
        return torch.tensor([settings.class_weights[label] for label in labels], dtype=torch.float32)
    for label, frequency in zip(labels, survey["frequencies"], strict=True):
        in_every_row = settings.multi_label and frequency == survey["rows"]
        if not frequency or in_every_row:
            raise RecipeError(
                f"classification.class_weights: balanced weights are undefined, because "
                f"{'every' if in_every_row else 'no'} training row has the label {label!r}. Give the weights by name, "
                "or remove the label."
            )
    frequencies = torch.tensor(survey["frequencies"], dtype=torch.float64)
    if settings.multi_label:
        return ((survey["rows"] - frequencies) / frequencies).float()
    return (frequencies.sum() / (len(frequencies) * frequencies)).float()
