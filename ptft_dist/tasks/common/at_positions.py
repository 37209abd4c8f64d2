"""Base class of tasks that predict the tokens at some positions of a row: masked, permuted and corrupted text."""

from __future__ import annotations

import torch

from ptft_dist.tasks.common.losses import (
    POSITIONS,
    loss_at_positions,
    network_inputs,
    perplexity,
    position_row_losses,
)
from ptft_dist.tasks.protocol import BaseTask, LossOut


class PredictsAtPositions(BaseTask):
    """Batches with `targets` and `target_positions` -> summed cross-entropy of the targets."""

    def logits(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The logits of all positions: [B, T, V]."""
        logits: torch.Tensor = model(**network_inputs(inputs)).logits
        return logits

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        return self._loss(inputs, self.logits(model, inputs))

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        logits = self.logits(model, inputs)
        rows = position_row_losses(logits, inputs["targets"], inputs[POSITIONS])
        return self._loss(inputs, logits)._replace(row_losses=rows)

    @staticmethod
    def _loss(inputs: dict[str, torch.Tensor], logits: torch.Tensor) -> LossOut:
        loss_sum, right, count = loss_at_positions(logits, inputs["targets"], inputs[POSITIONS])
        return LossOut(loss_sum, {"accuracy": (right, count)})

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Add the perplexity. loss: mean over the targets, in nats; accuracy: the fraction of them predicted correctly.

        The targets of span corruption include sentinels and EOS.
        """
        return {**totals, "perplexity": perplexity(totals["loss"])}
