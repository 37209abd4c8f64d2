"""Permuted language modelling: predict some tokens of a row in a random order (Yang et al. 2019, XLNet)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, XLNetConfig

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.losses import POSITIONS, loss_at_positions, network_inputs, perplexity, target_positions
from ptft_dist.tasks.common.padding import pad_id, pad_multiple, padded_width
from ptft_dist.tasks.plm.settings import PlmSettings
from ptft_dist.tasks.protocol import IGNORE, BaseTask, Batch, LossOut, TaskSetup


class PermutedLM(BaseTask):
    """Rows of token ids in, the summed cross-entropy of the chosen tokens out."""

    auto_class = AutoModelForCausalLM

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.pad_id, self.pad_multiple = pad_id(self.tokenizer.pad_token_id), pad_multiple(device)
        self.special_ids = np.array(sorted(self.tokenizer.all_special_ids))

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:  # noqa: ARG003
        if not isinstance(config, XLNetConfig):
            raise RecipeError(
                f"model: task plm needs the two streams of attention that XLNet has (model_type: xlnet), and a "
                f"{config.model_type} has one: train it with task: clm or mlm"
            )
        if config.attn_type != "bi" or config.bi_data:
            raise RecipeError("model: task plm needs attn_type: bi and bi_data: false in the network's config")

    def prepare_network(self, model: PreTrainedModel) -> None:
        """Freeze the weights for segments. Documents have one segment, so these weights add the same number to all
        scores of a query, which moves no probability: they get no gradient, and DDP would wait for one."""
        for name, parameter in model.named_parameters():
            if name.endswith(("seg_embed", "r_s_bias")):
                parameter.requires_grad_(False)

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """input_ids [B, T], none of them masked: perm_mask says which token sees which.

        attention_mask [B, T]: 1 for a token; perm_mask [B, T, T]: 1 where i must not see j; target_mapping [B, P, T]:
        1 where prediction p is that of token j; targets [B, P]: its id, else -100; target_positions. Masks and mapping
        are fp32. The choice and the order are a pure function of (seed, epoch, row).
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
            n, places = len(row.input_ids), np.flatnonzero(chosen)
            input_ids[i, :n], attention_mask[i, :n] = row.input_ids, 1
            perm_mask[i, :n, :n] = hidden(chosen, order)
            target_mapping[i, np.arange(len(places)), places] = 1
            targets[i, : len(places)] = row.input_ids[places]
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
        """Which tokens of a row are predicted, bool [T], and each token's place in the order, int64 [T]."""
        random = np.random.default_rng((self.setup.seed, *key))
        chosen = choose_spans(np.isin(row.input_ids, self.special_ids), self.settings, random)
        return chosen, random.permutation(len(row.input_ids))

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        logits = model(**network_inputs(inputs), use_mems=False).logits
        loss_sum, right, count = loss_at_positions(logits, inputs["targets"], inputs[POSITIONS])
        return LossOut(loss_sum, {"accuracy": (right, count)})

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """loss: mean over the predicted tokens, in nats; perplexity: its exponential; accuracy: the share predicted."""
        return {**totals, "perplexity": perplexity(totals["loss"])}


def choose_spans(special: np.ndarray, settings: PlmSettings, random: np.random.Generator) -> np.ndarray:
    """Which tokens are predicted: bool [T]. One span somewhere in each stretch of a row; a stretch is as long as makes
    the span its mask_share. Never special tokens, and never all tokens: the first in the order would see nothing."""
    chosen = np.zeros(len(special), bool)
    start = 0
    while start < len(special):
        span = int(random.integers(1, settings.longest_span + 1))
        stretch = round(span / settings.mask_share)
        at = start + int(random.integers(stretch - span + 1))
        chosen[at : at + span] = True
        start += stretch
    chosen &= ~special
    if chosen.all():
        chosen[random.integers(len(chosen))] = False
    return chosen


def hidden(chosen: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Whether token j is hidden from token i: bool [T, T].

    All tokens see the tokens that are not chosen. A chosen token is seen by the chosen tokens later in the order, and
    not by itself; the network adds a token's own content in its content stream.
    """
    rank = np.where(chosen, order, -1)
    return (rank[:, None] <= rank[None, :]) & chosen[None, :]
