"""Masked language modelling: predict some of the tokens from all others (Devlin et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import AutoModelForMaskedLM, PretrainedConfig

from ptft_dist.data.store import Row
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.at_positions import PredictsAtPositions
from ptft_dist.tasks.common.isolation import IsolationProbe
from ptft_dist.tasks.common.masked_rows import MaskedRows
from ptft_dist.tasks.common.padding_probe import refuse_known
from ptft_dist.tasks.protocol import Batch, TaskSetup


class MaskedLM(PredictsAtPositions):
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

    def probe(self) -> IsolationProbe | None:
        if not self.settings.isolated:
            return None
        return IsolationProbe(self._probed, self.rows.padded.inputs, len(self.tokenizer), self.setup.name)

    def _probed(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.logits(model, inputs).float()
