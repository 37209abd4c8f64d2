"""Span corruption: the decoder predicts spans that the encoder reads as sentinels (Raffel et al. 2020, T5)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedTokenizerBase

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.at_positions import PredictsAtPositions
from ptft_dist.tasks.common.losses import (
    POSITIONS,
    target_positions,
)
from ptft_dist.tasks.common.padding import pad, pad_id, pad_multiple
from ptft_dist.tasks.protocol import IGNORE, Batch, TaskSetup
from ptft_dist.tasks.span_corruption.settings import SpanCorruptionSettings


class SpanCorruption(PredictsAtPositions):
    """Rows of token ids -> summed cross-entropy of the decoder's targets: sentinels, masked tokens and EOS."""

    auto_class = AutoModelForSeq2SeqLM

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.sentinels = np.array(sentinel_ids(self.tokenizer), np.int64)
        self.eos_id, self.pad_id = int(self.tokenizer.eos_token_id), pad_id(self.tokenizer.pad_token_id)
        self.start_id = self.pad_id if network.decoder_start_id is None else network.decoder_start_id
        self.pad_multiple = pad_multiple(device)

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:
        """Let the decoder start with the padding token, as in T5, unless the network or the recipe sets another one.

        Raises:
            RecipeError: the network is not an encoder-decoder or has too few positions, or the tokenizer has no
                padding token or too few sentinels.
        """
        if type(config) not in AutoModelForSeq2SeqLM._model_mapping:
            raise RecipeError(
                f"model: task span_corruption needs an encoder-decoder network (t5, mt5, umt5, bart), and "
                f"{config.model_type} is not one: train it with task: clm or mlm"
            )
        unset = setup.config_keys is not None and "decoder_start_token_id" not in setup.config_keys
        if unset or config.decoder_start_token_id is None:
            config.decoder_start_token_id = setup.tokenizer.pad_token_id
        if config.decoder_start_token_id is None:
            raise RecipeError(
                "tokenizer: it has no padding token, and the decoder starts with it. Name one as pad_token in its "
                "tokenizer_config.json."
            )
        _check_sentinels(setup)
        _check_positions(setup, config)

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """Mask spans and pad rows, as a pure function of (seed, epoch, row).

        Inputs: input_ids and attention_mask (1: a token) [B, T]; targets [B, S], -100 for padding; decoder_input_ids
        [B, S], the targets shifted right by one; target_positions.
        """
        pairs = [self.corrupt(row.input_ids, key) for row, key in zip(rows, keys, strict=True)]
        sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
        shifted = [np.concatenate(([self.start_id], target[:-1])) for target in targets]
        padded = pad(targets, IGNORE, self.pad_multiple)
        inputs = {
            "input_ids": pad(sources, self.pad_id, self.pad_multiple),
            "attention_mask": pad([np.ones_like(source) for source in sources], 0, self.pad_multiple),
            "decoder_input_ids": pad(shifted, self.pad_id, self.pad_multiple),
            "targets": padded,
            POSITIONS: target_positions(padded.numpy()),
        }
        return Batch(inputs, sum(map(len, targets)), sum(len(row.input_ids) for row in rows))

    def corrupt(self, ids: np.ndarray, key: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """The encoder's input and the decoder's target of a row, both int64.

        For example, a b c d e f g becomes a b <0> e <1> EOS and <0> c d <1> f g EOS. An EOS at the end of the row is
        not duplicated.
        """
        text = ids[:-1] if len(ids) and ids[-1] == self.eos_id else ids
        noise = noise_mask(len(text), self.settings, np.random.default_rng((self.setup.seed, *key)))
        if not noise.any():
            return np.append(text, self.eos_id), np.array([self.eos_id])
        return self._replaced(text, noise), self._replaced(text, ~noise)

    def _replaced(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Replace each run of masked tokens by one sentinel, and append EOS."""
        begins = mask & ~np.concatenate(([False], mask[:-1]))
        kept = np.where(begins, self.sentinels[np.cumsum(begins) - 1], ids)[begins | ~mask]
        return np.append(kept, self.eos_id)


def span_counts(length: int, settings: SpanCorruptionSettings) -> tuple[int, int]:
    """The number of masked tokens and of spans in a row of `length` tokens; an unmasked token precedes each span."""
    noise = min(max(round(length * settings.density), 1), length - 1)
    return noise, min(max(round(noise / settings.mean_span), 1), noise, length - noise)


def noise_mask(length: int, settings: SpanCorruptionSettings, random: np.random.Generator) -> np.ndarray:
    """The mask of masked tokens: bool [T] (T5's random_spans_noise_mask).

    Unmasked and masked runs alternate; the first run is unmasked and the last one masked. Their number follows from the
    length, and all divisions of the row into that many runs are equally likely.
    """
    if length < 2:  # no unmasked token would remain
        return np.zeros(length, bool)
    noise, spans = span_counts(length, settings)
    runs = np.stack([_segments(length - noise, spans, random), _segments(noise, spans, random)], axis=1)
    return np.repeat(np.tile([False, True], spans), runs.ravel())


def _segments(total: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Divide `total` into `count` lengths of at least 1, all divisions equally likely: int64 [count]."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=total)


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ... up to the first one missing. In mT5 they begin with U+2581."""
    vocab, ids = tokenizer.get_vocab(), list[int]()
    while (token := f"<extra_id_{len(ids)}>") in vocab or (token := f"\u2581{token}") in vocab:
        ids.append(vocab[token])
    return ids


def _check_sentinels(setup: TaskSetup) -> None:
    settings, length, available = setup.settings, setup.max_length, len(sentinel_ids(setup.tokenizer))
    if not setup.learned_tokenizer and settings.sentinels != SpanCorruptionSettings().sentinels:
        raise RecipeError("span_corruption.sentinels has no effect here: it needs tokenizer.train")
    _, needed = span_counts(length, settings)
    if available < needed:
        remedy = "raise span_corruption.sentinels" if setup.learned_tokenizer else "add them with tokenizer.add"
        raise RecipeError(
            f"tokenizer: a row of {length} tokens has up to {needed} masked spans, and the tokenizer has {available} "
            f"sentinels (<extra_id_0>, <extra_id_1>, ...): {remedy}, lower data.max_length, or raise "
            "span_corruption.mean_span"
        )


def _check_positions(setup: TaskSetup, config: PretrainedConfig) -> None:
    """Raises RecipeError if inputs or targets exceed the network's positions.

    They can be longer than the row: both get a sentinel for each masked span, and an EOS.
    """
    positions, length = getattr(config, "max_position_embeddings", None), setup.max_length
    noise, spans = span_counts(length, setup.settings)
    for side, longest in (("inputs", length - noise + spans + 1), ("targets", noise + spans + 1)):
        if isinstance(positions, int) and 0 < positions < longest:
            raise RecipeError(
                f"data.max_length: a row of {length} tokens gives {side} of {longest} tokens, sentinels and EOS "
                f"included, and the network has {positions} positions (max_position_embeddings): lower "
                "data.max_length, or raise span_corruption.mean_span"
            )
