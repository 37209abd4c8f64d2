"""BERT's pretraining: masked language modelling and next-sentence prediction (Devlin et al. 2019)."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForPreTraining, PretrainedConfig

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.losses import POSITIONS, loss_at_positions, network_inputs, perplexity, position_row_losses
from ptft_dist.tasks.common.masked_rows import MaskedRows
from ptft_dist.tasks.common.padding import pad
from ptft_dist.tasks.common.padding_probe import refuse_known
from ptft_dist.tasks.protocol import BaseTask, Batch, LossOut, TaskSetup


class MaskedLMWithPairs(BaseTask):
    """Rows [CLS] A [SEP] B [SEP] -> two summed cross-entropies: of masked tokens and of next-sentence prediction."""

    auto_class = AutoModelForPreTraining

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.rows = MaskedRows(setup, network, device)

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:  # noqa: ARG003
        networks: Any = AutoModelForPreTraining._model_mapping
        if type(config) not in networks or not _has_pair_head(networks[type(config)]):
            raise RecipeError(
                f"model: task mlm_nsp needs a network with a next-sentence head (bert, ernie, megatron-bert, "
                f"mobilebert, fnet), and {config.model_type} has none: train it with task: mlm"
            )
        refuse_known(config)

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """MaskedRows.collate, with token_type_ids [B, T] (1: second segment) and targets_next [B] (0: the second
        segment follows the first, 1: it is a random one)."""
        batch = self.rows.collate(rows, keys)
        types, width = pad([row.columns["token_type_ids"] for row in rows], 0), batch.inputs["input_ids"].shape[1]
        inputs = {
            **batch.inputs,
            "token_type_ids": torch.nn.functional.pad(types, (0, width - types.shape[1])),
            "targets_next": torch.tensor([int(row.columns["next"][0]) for row in rows]),
        }
        return replace(batch, inputs=inputs, more_counts=(len(rows),))

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """The two losses, summed over the masked tokens and over the pairs: loss_sum [2]."""
        return self._loss(inputs, model(**network_inputs(inputs)))

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """The losses of rows are those of the masked tokens."""
        output = model(**network_inputs(inputs))
        rows = position_row_losses(output.prediction_logits, inputs["targets"], inputs[POSITIONS])
        return self._loss(inputs, output)._replace(row_losses=rows)

    @staticmethod
    def _loss(inputs: dict[str, torch.Tensor], output: Any) -> LossOut:
        tokens, right_tokens, token_count = loss_at_positions(
            output.prediction_logits, inputs["targets"], inputs[POSITIONS]
        )
        pairs, right_pairs, pair_count = loss_at_positions(output.seq_relationship_logits, inputs["targets_next"])
        metrics = {
            "mlm_loss": (tokens.detach(), token_count),
            "nsp_loss": (pairs.detach(), pair_count),
            "mlm_accuracy": (right_tokens, token_count),
            "nsp_accuracy": (right_pairs, pair_count),
        }
        return LossOut(torch.stack([tokens, pairs]), metrics)

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Add the perplexity of the masked tokens. loss: the sum of both mean losses, in nats."""
        return {**totals, "perplexity": perplexity(totals["mlm_loss"])}


def _has_pair_head(network: type[torch.nn.Module]) -> bool:
    return "next_sentence_label" in inspect.signature(network.forward).parameters
