"""Masked language modelling: predict some of the tokens from all others (Devlin et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForMaskedLM, PretrainedConfig

from ptft_dist.data.store import Row
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.isolation import IsolationProbe
from ptft_dist.tasks.common.losses import POSITIONS, loss_at_positions, network_inputs, perplexity, position_row_losses
from ptft_dist.tasks.common.masked_rows import MaskedRows
from ptft_dist.tasks.common.padding_probe import refuse_known
from ptft_dist.tasks.protocol import BaseTask, Batch, LossOut, TaskSetup


class MaskedLM(BaseTask):
    """Rows of token ids -> summed cross-entropy of the masked tokens."""

    auto_class = AutoModelForMaskedLM

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.rows = MaskedRows(setup, network, device)

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:  # noqa: ARG003
        """Raises RecipeError for a network that reads padding."""
        refuse_known(config)

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """As MaskedRows.collate."""
        return self.rows.collate(rows, keys)

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        return self._loss(inputs, self._logits(model, inputs))

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        logits = self._logits(model, inputs)
        rows = position_row_losses(logits, inputs["targets"], inputs[POSITIONS])
        return self._loss(inputs, logits)._replace(row_losses=rows)

    @staticmethod
    def _logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = model(**network_inputs(inputs)).logits
        return logits

    @staticmethod
    def _loss(inputs: dict[str, torch.Tensor], logits: torch.Tensor) -> LossOut:
        loss_sum, right, count = loss_at_positions(logits, inputs["targets"], inputs[POSITIONS])
        return LossOut(loss_sum, {"accuracy": (right, count)})

    def probe(self) -> IsolationProbe | None:
        if not self.settings.isolated:
            return None
        return IsolationProbe(self._probed, self.rows.padded.inputs, len(self.tokenizer), self.setup.name)

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Add the perplexity. loss: mean over the masked tokens, in nats; accuracy: the fraction of them predicted
        correctly."""
        return {**totals, "perplexity": perplexity(totals["loss"])}

    def _probed(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self._logits(model, inputs).float()
