"""Masked language modelling: predict some of the tokens from all others (Devlin et al. 2019)."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.common.isolation import IsolationProbe, document_numbers, restarting_positions
from ptft_dist.tasks.common.masking_settings import Masking
from ptft_dist.tasks.common.padding import pad_multiple
from ptft_dist.tasks.common.padding_probe import refuse_known
from ptft_dist.tasks.protocol import IGNORE, BaseTask, Batch, LossOut

SPAN_LENGTH, LONGEST_SPAN = 5.0, 10  # SpanBERT's p = 0.2 and its clip


class MaskedLM(BaseTask):
    """Rows of token ids in, the summed cross-entropy of the chosen tokens out."""

    auto_class: Any = AutoModelForMaskedLM

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        facts: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> None:
        if tokenizer.mask_token_id is None:
            raise RecipeError(f"tokenizer: it has no mask token, and task {recipe.task} needs one (mask_token)")
        assert isinstance(recipe.settings, Masking)
        self.seed, self.settings, self.isolate = recipe.train.seed, recipe.settings, recipe.settings.isolated
        self.mask_id, self.vocab_size = int(tokenizer.mask_token_id), len(tokenizer)
        self.pad_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.special = np.zeros(self.vocab_size, bool)
        self.special[tokenizer.all_special_ids] = True
        self.begins_word = word_beginnings(tokenizer, recipe.task) if self.settings.unit == "word" else None
        self.pad_multiple = pad_multiple(device)
        self.position_offset, self.least_width = 0, 0
        self.max_length, self.has_mask = recipe.data.max_length, True

    @classmethod
    def metric_names(cls, recipe: Recipe) -> Sequence[str]:  # noqa: ARG003
        return "loss", "perplexity", "accuracy"

    @classmethod
    def fit_config(cls, recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: ARG003
        """Raises RecipeError for a network that reads padding."""
        refuse_known(config)

    def install(self, model: PreTrainedModel) -> None:
        """RoBERTa and its kin count positions from padding_idx + 1. FNet takes no mask and mixes the padding in: its
        rows are all padded alike, so that none depends on the others of its micro-batch."""
        table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
        padding = getattr(table, "padding_idx", None)
        self.position_offset = 0 if padding is None else padding + 1
        self.has_mask = self.isolate or "attention_mask" in inspect.signature(model.forward).parameters
        self.least_width = 0 if self.has_mask else self.max_length

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """input_ids with masks and targets (the original ids where chosen, else -100), both [B, T]; attention_mask,
        [B, T] (True: a token), or [B, 1, T, T] and position_ids where documents share a row and must not see each
        other. The choice is a pure function of (seed, epoch, row)."""
        longest = max(self.least_width, *(len(row.input_ids) for row in rows))
        width = -(-longest // self.pad_multiple) * self.pad_multiple
        input_ids = np.full((len(rows), width), self.pad_id, np.int64)
        targets = np.full((len(rows), width), IGNORE, np.int64)
        for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
            n = len(row.input_ids)
            input_ids[i, :n], targets[i, :n] = self.mask(row.input_ids, np.random.default_rng((self.seed, *key)))
        inputs = {"input_ids": torch.from_numpy(input_ids), "targets": torch.from_numpy(targets)}
        numbers = document_numbers(rows, width)  # -1: padding
        if self.isolate:
            inputs["position_ids"] = torch.from_numpy(restarting_positions(rows, width) + self.position_offset)
            inputs["attention_mask"] = torch.from_numpy(numbers[:, None, :, None] == numbers[:, None, None, :])
        elif self.has_mask:
            inputs["attention_mask"] = torch.from_numpy(numbers >= 0)
        return Batch(inputs, int((targets != IGNORE).sum()), sum(len(row.input_ids) for row in rows))

    def mask(self, ids: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """What the network sees, and what it is to predict (-100: nothing): both int64 [T]."""
        settings = self.settings
        chosen = choose(ids, self.special[ids], self.begins_word, settings, random)
        # Each chosen unit is masked, replaced or kept as one for spans, token by token otherwise (as the papers do).
        fate = random.random(len(ids))
        if settings.unit == "span" and len(ids):
            begins = chosen & ~np.concatenate(([False], chosen[:-1]))
            fate = fate[np.maximum.accumulate(np.where(begins, np.arange(len(ids)), 0))]
        seen = ids.copy()
        seen[chosen & (fate < settings.mask_share)] = self.mask_id
        replaced = chosen & (fate >= settings.mask_share) & (fate < settings.mask_share + settings.random_share)
        seen[replaced] = random.integers(self.vocab_size, size=len(ids))[replaced]
        return seen, np.where(chosen, ids, IGNORE)

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        loss_sum, right, count = summed_loss(self.logits(model, inputs), inputs["targets"])
        return LossOut(loss_sum, {"accuracy": (right, count)})

    def logits(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """fp32 [B, T, V]."""
        logits: torch.Tensor = model(**{key: x for key, x in inputs.items() if not key.startswith("targets")}).logits
        return logits.float()

    def probe(self) -> IsolationProbe | None:
        return IsolationProbe(self.logits, self.plain_inputs, self.vocab_size, "mlm") if self.isolate else None

    def plain_inputs(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The rows as the network gets them, but with nothing masked."""
        inputs = self.collate(rows, [(0, i) for i in range(len(rows))]).inputs
        original = torch.where(inputs["targets"] != IGNORE, inputs["targets"], inputs["input_ids"])
        return {**inputs, "input_ids": original}

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """loss: mean over the chosen tokens, in nats; perplexity: its exponential; accuracy: the share predicted."""
        return {**totals, "perplexity": perplexity(totals["loss"])}


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where there is a target: the cross-entropy summed, how many are predicted right, and how many there are.

    logits: [..., V]; targets: [...], -100 where there is none.
    """
    chosen = targets != IGNORE
    logits, labels = logits[chosen].float(), targets[chosen]
    right = (logits.argmax(-1) == labels).sum()
    return F.cross_entropy(logits, labels, reduction="sum"), right, chosen.sum()


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def choose(
    ids: np.ndarray,
    special: np.ndarray,
    begins_word: np.ndarray | None,
    settings: Masking,
    random: np.random.Generator,
) -> np.ndarray:
    """Which tokens of a row are to be predicted: bool [T], never a special one."""
    if settings.unit == "span":
        return _choose_spans(special, settings, random)
    if begins_word is None:
        return (random.random(len(ids)) < settings.probability) & ~special
    words = np.cumsum(begins_word[ids] | special)  # a special token ends the word before it
    return (random.random(len(ids) + 1) < settings.probability)[words] & ~special


def _choose_spans(special: np.ndarray, settings: Masking, random: np.random.Generator) -> np.ndarray:
    """Spans of geometric length until the share is reached; no span crosses a special token."""
    chosen = np.zeros(len(special), bool)
    budget = round(settings.probability * int((~special).sum()))
    mean = settings.span_length or SPAN_LENGTH
    tries = 0
    while chosen.sum() < budget and tries < 20 * len(special):
        tries += 1
        length = min(int(random.geometric(1 / mean)), LONGEST_SPAN, budget - int(chosen.sum()))
        start = int(random.integers(len(special)))
        span = slice(start, start + length)
        if start + length <= len(special) and not special[span].any() and not chosen[span].any():
            chosen[span] = True
    return chosen


def word_beginnings(tokenizer: PreTrainedTokenizerBase, section: str = "mlm") -> np.ndarray:
    """For each token id, whether a word begins with it: bool [V]. Raises RecipeError where that cannot be known."""
    kind, tokens = None, tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        kind = (state["model"]["type"], "ByteLevel" in json.dumps(state["pre_tokenizer"]))
    if kind is not None and kind[0] == "WordPiece":
        return np.array([not token.startswith("##") for token in tokens])
    if kind == ("BPE", True):  # bytes: a space is spelt U+0120, a line feed U+010A, a tab U+0109
        return np.array([token.startswith(("\u0120", "\u010a", "\u0109")) for token in tokens])
    if kind is not None and kind[0] == "Unigram":
        return np.array([token.startswith("\u2581") for token in tokens])
    raise RecipeError(f"{section}.unit: where words begin is not known for this tokenizer; use unit: token or span")
