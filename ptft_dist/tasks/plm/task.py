"""Permuted language modelling: predict some tokens of a row in random order (Yang et al. 2019, XLNet)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, XLNetConfig

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.at_positions import PredictsAtPositions
from ptft_dist.tasks.common.losses import (
    POSITIONS,
    network_inputs,
    target_positions,
)
from ptft_dist.tasks.common.padding import pad_id, pad_multiple, padded_width
from ptft_dist.tasks.plm.settings import PlmSettings
from ptft_dist.tasks.protocol import IGNORE, Batch, TaskSetup


class PermutedLM(PredictsAtPositions):
    """Rows of token ids -> summed cross-entropy of the predicted tokens."""

    auto_class = AutoModelForCausalLM

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.pad_id, self.pad_multiple = pad_id(self.tokenizer.pad_token_id), pad_multiple(device)
        self.special_ids = np.array(sorted(self.tokenizer.all_special_ids))

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:  # noqa: ARG003
        if not isinstance(config, XLNetConfig):
            raise RecipeError(
                f"model: task plm needs XLNet's two-stream attention (model_type: xlnet), and {config.model_type} does "
                "not have it: train it with task: clm or mlm"
            )
        if config.attn_type != "bi" or config.bi_data:
            raise RecipeError("model: task plm needs a network config with attn_type: bi and bi_data: false")

    def prepare_network(self, model: PreTrainedModel) -> None:
        """Freeze the segment weights, which get no gradient; DDP would wait for one.

        Documents have one segment. The segment weights then add the same constant to all attention scores of a query,
        and the softmax ignores it.
        """
        for name, parameter in model.named_parameters():
            if name.endswith(("seg_embed", "r_s_bias")):
                parameter.requires_grad_(False)

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """Pad rows, and draw the predicted tokens and their order as a pure function of (seed, epoch, row).

        Inputs:
            input_ids: [B, T], without mask tokens.
            attention_mask: fp32 [B, T], 1 for a token.
            perm_mask: fp32 [B, T, T], 1 where token i must not attend to token j.
            target_mapping: fp32 [B, P, T], 1 where prediction p is token j.
            targets: [B, P], the ids of the predicted tokens, -100 for padding.
            target_positions: see losses.target_positions.
        """
        drawn = [self.draw(row, key) for row, key in zip(rows, keys, strict=True)]
        width = padded_width((len(row.input_ids) for row in rows), self.pad_multiple)
        predictions = max(1, *(int(chosen.sum()) for chosen, _ in drawn))
        input_ids = np.full((len(rows), width), self.pad_id, np.int64)
        attention_mask = np.zeros((len(rows), width), np.float32)
        perm_mask = np.zeros((len(rows), width, width), np.float32)
        target_mapping = np.zeros((len(rows), predictions, width), np.float32)
        targets = np.full((len(rows), predictions), IGNORE, np.int64)
        for i, (row, (chosen, order)) in enumerate(zip(rows, drawn, strict=True)):
            n, positions = len(row.input_ids), np.flatnonzero(chosen)
            input_ids[i, :n], attention_mask[i, :n] = row.input_ids, 1
            perm_mask[i, :n, :n] = hidden(chosen, order)
            target_mapping[i, np.arange(len(positions)), positions] = 1
            targets[i, : len(positions)] = row.input_ids[positions]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "perm_mask": perm_mask,
            "target_mapping": target_mapping,
            "targets": targets,
        }
        tensors = {name: torch.from_numpy(values) for name, values in inputs.items()}
        tensors[POSITIONS] = target_positions(targets)
        return Batch(tensors, int((targets != IGNORE).sum()), sum(len(row.input_ids) for row in rows))

    def draw(self, row: Row, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Draw the mask of predicted tokens, bool [T], and each token's rank in the prediction order, int64 [T]."""
        random = np.random.default_rng((self.setup.seed, *key))
        chosen = choose_spans(np.isin(row.input_ids, self.special_ids), self.settings, random)
        return chosen, random.permutation(len(row.input_ids))

    def logits(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        logits: torch.Tensor = model(**network_inputs(inputs), use_mems=False).logits
        return logits


def choose_spans(special: np.ndarray, settings: PlmSettings, random: np.random.Generator) -> np.ndarray:
    """Draw the mask of predicted tokens: bool [T].

    The row is divided into windows with one span each, at a random position. A window has span / mask_share tokens.
    Special tokens are not predicted. At least one token is not predicted, because otherwise the first prediction would
    have no context.

    Args:
        special: mask of special tokens, bool [T].
    """
    chosen = np.zeros(len(special), bool)
    window_start = 0
    while window_start < len(special):
        span = int(random.integers(1, settings.longest_span + 1))
        window = round(span / settings.mask_share)
        span_start = window_start + int(random.integers(window - span + 1))
        chosen[span_start : span_start + span] = True
        window_start += window
    chosen &= ~special
    if chosen.all():
        chosen[random.integers(len(chosen))] = False
    return chosen


def hidden(chosen: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The mask of pairs (i, j) where token i must not attend to token j: bool [T, T].

    All tokens attend to the tokens that are not predicted. Only predicted tokens later in the order attend to a
    predicted token. A predicted token does not attend to itself; the network adds it in its content stream.
    """
    rank = np.where(chosen, order, -1)
    return (rank[:, None] <= rank[None, :]) & chosen[None, :]
