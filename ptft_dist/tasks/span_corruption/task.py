"""Span corruption: spans of a row are replaced by sentinels, and written after them (Raffel et al. 2020, T5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedTokenizerBase

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.losses import POSITIONS, loss_at_positions, network_inputs, perplexity, target_positions
from ptft_dist.tasks.common.padding import pad, pad_id, pad_multiple
from ptft_dist.tasks.protocol import IGNORE, BaseTask, Batch, LossOut, TaskSetup
from ptft_dist.tasks.span_corruption.settings import SpanCorruptionSettings


class SpanCorruption(BaseTask):
    """Rows of token ids in, the summed cross-entropy of the hidden tokens and sentinels out."""

    auto_class = AutoModelForSeq2SeqLM

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.sentinels = np.array(sentinel_ids(self.tokenizer), np.int64)
        self.eos_id, self.pad_id = int(self.tokenizer.eos_token_id), pad_id(self.tokenizer.pad_token_id)
        self.start_id = self.pad_id if network.decoder_start_id is None else network.decoder_start_id
        self.pad_multiple = pad_multiple(device)

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:
        """The decoder starts with the padding token, as T5's, unless the network or the recipe says otherwise."""
        if type(config) not in AutoModelForSeq2SeqLM._model_mapping:
            raise RecipeError(
                f"model: task span_corruption needs an encoder and a decoder (t5, mt5, umt5, bart), and a "
                f"{config.model_type} does not have both: train it with task: clm or mlm"
            )
        unsaid = setup.config_keys is not None and "decoder_start_token_id" not in setup.config_keys
        if unsaid or config.decoder_start_token_id is None:
            config.decoder_start_token_id = setup.tokenizer.pad_token_id
        if config.decoder_start_token_id is None:
            raise RecipeError("tokenizer: it has no padding token, with which the decoder starts (pad_token)")
        _check_sentinels(setup)
        _check_positions(setup, config)

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """input_ids and attention_mask (1: a token) [B, T]; targets [B, S], -100 for padding; decoder_input_ids [B, S],
        the targets shifted right by one; target_positions. A pure function of (seed, epoch, row)."""
        pairs = [self.corrupt(row.input_ids, key) for row, key in zip(rows, keys, strict=True)]
        sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
        before = [np.concatenate(([self.start_id], target[:-1])) for target in targets]
        padded = pad(targets, IGNORE, self.pad_multiple)
        inputs = {
            "input_ids": pad(sources, self.pad_id, self.pad_multiple),
            "attention_mask": pad([np.ones_like(source) for source in sources], 0, self.pad_multiple),
            "decoder_input_ids": pad(before, self.pad_id, self.pad_multiple),
            "targets": padded,
            POSITIONS: target_positions(padded.numpy()),
        }
        return Batch(inputs, sum(map(len, targets)), sum(len(row.input_ids) for row in rows))

    def corrupt(self, ids: np.ndarray, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """What the encoder reads and what is to be written, both int64: of the row a b c d e f g, for example,
        a b <0> e <1> EOS and <0> c d <1> f g EOS. A row that ends with an EOS of its own gets no second one."""
        text = ids[:-1] if len(ids) and ids[-1] == self.eos_id else ids
        noise = noise_mask(len(text), self.settings, np.random.default_rng((self.setup.seed, *key)))
        if not noise.any():
            return np.append(text, self.eos_id), np.array([self.eos_id])
        return self._replaced(text, noise), self._replaced(text, ~noise)

    def _replaced(self, ids: np.ndarray, hide: np.ndarray) -> np.ndarray:
        """The ids with the first token of each hidden run as a sentinel, the others left out, and EOS at the end."""
        begins = hide & ~np.concatenate(([False], hide[:-1]))
        kept = np.where(begins, self.sentinels[np.cumsum(begins) - 1], ids)[begins | ~hide]
        return np.append(kept, self.eos_id)

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        logits = model(**network_inputs(inputs)).logits
        loss_sum, right, count = loss_at_positions(logits, inputs["targets"], inputs[POSITIONS])
        return LossOut(loss_sum, {"accuracy": (right, count)})

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """loss: mean over the written tokens, in nats, sentinels and EOS among them; perplexity: its exponential;
        accuracy: the share predicted."""
        return {**totals, "perplexity": perplexity(totals["loss"])}


def span_counts(length: int, settings: SpanCorruptionSettings) -> tuple[int, int]:
    """How many tokens of a row are hidden, and in how many spans; there is a visible token before each."""
    noise = min(max(round(length * settings.density), 1), length - 1)
    return noise, min(max(round(noise / settings.mean_span), 1), noise, length - noise)


def noise_mask(length: int, settings: SpanCorruptionSettings, random: np.random.Generator) -> np.ndarray:
    """Which tokens are hidden: bool [T]. Visible and hidden runs take turns, a visible one first and a hidden one last;
    their number follows from the length, and all ways to cut the row into that many are equally likely."""
    if length < 2:  # nothing would be left to see
        return np.zeros(length, bool)
    noise, spans = span_counts(length, settings)
    runs = np.stack([_segments(length - noise, spans, random), _segments(noise, spans, random)], axis=1)
    return np.repeat(np.tile([False, True], spans), runs.ravel())


def _segments(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """`total` cut into `count` lengths of at least 1, all ways equally likely: int64 [count]."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1> and so on, as far as the tokenizer knows them. mT5 spells them with U+2581
    before."""
    known, found = tokenizer.get_vocab(), list[int]()
    while (word := f"<extra_id_{len(found)}>") in known or (word := f"\u2581{word}") in known:
        found.append(known[word])
    return found


def _check_sentinels(setup: TaskSetup) -> None:
    settings, length, there = setup.settings, setup.max_length, len(sentinel_ids(setup.tokenizer))
    if not setup.learned_tokenizer and settings.sentinels != SpanCorruptionSettings().sentinels:
        raise RecipeError("span_corruption.sentinels has no effect here: it needs tokenizer.train")
    _, needed = span_counts(length, settings)
    if there < needed:
        remedy = "raise span_corruption.sentinels" if setup.learned_tokenizer else "add them with tokenizer.add"
        raise RecipeError(
            f"tokenizer: a row of {length} tokens gets up to {needed} hidden spans, and the tokenizer has {there} "
            f"sentinels (<extra_id_0> and so on): {remedy}, lower data.max_length, or raise span_corruption.mean_span"
        )


def _check_positions(setup: TaskSetup, config: PretrainedConfig) -> None:
    """A row can become longer: every hidden span has a sentinel on both sides, and both sides get an EOS."""
    positions, length = getattr(config, "max_position_embeddings", None), setup.max_length
    noise, spans = span_counts(length, setup.settings)
    for side, longest in (("inputs", length - noise + spans + 1), ("targets", noise + spans + 1)):
        if isinstance(positions, int) and 0 < positions < longest:
            raise RecipeError(
                f"data.max_length: a row of {length} tokens gives {side} of {longest}, sentinels and EOS among them, "
                f"and the network has {positions} positions (max_position_embeddings): lower data.max_length, or raise "
                "span_corruption.mean_span"
            )
