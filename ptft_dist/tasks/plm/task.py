"""Permuted language modelling: predict some tokens of a row in a random order (Yang et al. 2019, XLNet)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    XLNetConfig,
)

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.common.padding import pad_multiple
from ptft_dist.tasks.mlm.task import perplexity, summed_loss
from ptft_dist.tasks.plm.settings import PlmSettings
from ptft_dist.tasks.protocol import IGNORE, BaseTask, Batch, LossOut


class PermutedLM(BaseTask):
    """Rows of token ids in, the summed cross-entropy of the chosen tokens out."""

    auto_class = AutoModelForCausalLM

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        facts: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> None:
        self.seed, self.settings = recipe.train.seed, recipe.plm
        self.pad_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.special_ids = np.array(sorted(tokenizer.all_special_ids))
        self.pad_multiple = pad_multiple(device)

    @classmethod
    def metric_names(cls, recipe: Recipe) -> Sequence[str]:  # noqa: ARG003
        return "loss", "perplexity", "accuracy"

    @classmethod
    def fit_config(
        cls,
        recipe: Recipe,  # noqa: ARG003
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,  # noqa: ARG003
    ) -> None:
        if not isinstance(config, XLNetConfig):
            raise RecipeError(
                f"model: task plm needs the two streams of attention that XLNet has (model_type: xlnet), and a "
                f"{config.model_type} has one: train it with task: clm or mlm"
            )
        if config.attn_type != "bi" or config.bi_data:
            raise RecipeError("model: task plm needs attn_type: bi and bi_data: false in the network's config")

    def install(self, model: PreTrainedModel) -> None:
        """Documents have one segment. The same number is then added to all scores of a query, which moves no
        probability: the weights for segments get no gradient, and DDP would wait for one."""
        for name, parameter in model.named_parameters():
            if name.endswith(("seg_embed", "r_s_bias")):
                parameter.requires_grad_(False)

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """input_ids [B, T], none of them hidden: who sees what is perm_mask's business.

        attention_mask [B, T]: 1 for a token; perm_mask [B, T, T]: 1 where i must not see j; target_mapping [B, P, T]:
        1 where prediction p is that of token j; targets [B, P]: its id, else -100. All but ids are fp32. The choice
        and the order are a pure function of (seed, epoch, row).
        """
        drawn = [self.draw(row, key) for row, key in zip(rows, keys, strict=True)]
        width = -(-max(len(row.input_ids) for row in rows) // self.pad_multiple) * self.pad_multiple
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
        return Batch(tensors, int((targets != IGNORE).sum()), sum(len(row.input_ids) for row in rows))

    def draw(self, row: Row, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens of a row are predicted, bool [T], and each token's place in the order, int64 [T]."""
        random = np.random.default_rng((self.seed, *key))
        chosen = choose_spans(np.isin(row.input_ids, self.special_ids), self.settings, random)
        return chosen, random.permutation(len(row.input_ids))

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        plain = {key: x for key, x in inputs.items() if key != "targets"}
        loss_sum, right, count = summed_loss(model(**plain, use_mems=False).logits, inputs["targets"])
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
    """What must not be seen: bool [T, T], whether token j is hidden from i.

    All see the tokens that are not chosen. A chosen one is seen by those chosen ones that come later in the order, so
    not by itself; the network adds a token's own content where it stands for others.
    """
    rank = np.where(chosen, order, -1)
    return (rank[:, None] <= rank[None, :]) & chosen[None, :]
