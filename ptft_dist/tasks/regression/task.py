"""Regression: predict a number from a text or a pair of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ptft_dist.data.store import Row
from ptft_dist.tasks.common.labelled_text import LabelledTextTask
from ptft_dist.tasks.common.scores.labels import regression_scores
from ptft_dist.tasks.protocol import Batch, Judged, LossOut, TaskSetup

ERRORS: dict[str, Callable[..., torch.Tensor]] = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


class Regression(LabelledTextTask):
    """Rows of token ids -> summed error of the predicted numbers."""

    @classmethod
    def config_settings(cls, setup: TaskSetup) -> dict[str, Any]:  # noqa: ARG003
        return {"num_labels": 1, "problem_type": "regression"}

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """Pad texts and add targets, fp32 [B]."""
        targets = torch.tensor([float(row.columns["labels"][0]) for row in rows])
        inputs = {**self.text_inputs(rows), "targets": targets}
        return Batch(inputs, len(rows), sum(len(row.input_ids) for row in rows))

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        predicted, targets = self.logits(model, inputs)[:, 0], inputs["targets"]
        mask = ~targets.isnan()  # NaN: a row of a dummy batch
        losses = ERRORS[self.settings.loss](predicted, targets.nan_to_num(), reduction="none")
        rows = torch.stack([losses.detach() * mask, mask.float()], 1)
        return LossOut((losses * mask).sum(), {}, predicted.detach(), rows)

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        gold = [float(row(number).columns["labels"][0]) for number in predictions]
        return regression_scores(gold, list(predictions.values())), []

    def answer(self, predictions: Sequence[Any], rows: Sequence[Row]) -> Mapping[str, Any]:  # noqa: ARG002
        return {"number": float(predictions[0])}

    def judge(self, answer: Mapping[str, Any], rows: Sequence[Row]) -> Judged:
        gold = float(rows[0].meta["label"])
        error = answer["number"] - gold
        return Judged(answer, gold, {"mse": (error**2, 1), "mae": (abs(error), 1)})

    def details(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """Quantiles of prediction minus reference, by percent."""
        errors = [each.answer["number"] - each.reference for each in judged]
        return {"errors": {f"p{q:02}": float(np.percentile(errors, q)) for q in (1, 5, 25, 50, 75, 95, 99)}}
