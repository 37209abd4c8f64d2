"""Base class of tasks with labelled texts: collates texts, and checks that the network ignores padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.last_token import LastToken
from ptft_dist.tasks.common.losses import network_inputs
from ptft_dist.tasks.common.padding import pad, pad_multiple
from ptft_dist.tasks.common.padding_probe import (
    LONG,
    ROWS,
    SHORT,
    TOLERANCE,
    TOLERANCE_16_BITS,
    PaddingProbe,
    refuse_known,
)
from ptft_dist.tasks.protocol import BaseTask, TaskSetup


class LabelledTextTask(BaseTask):
    """Base class of tasks with one or two texts per row."""

    auto_class: Any = AutoModelForSequenceClassification
    texts = 1
    """Number of texts in a row of the probe."""
    ends_by_mask = False
    """Decoders read the score at the last token by the attention mask, also where transformers reads another one."""

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        """Raises RecipeError if network and tokenizer have different padding tokens."""
        super().__init__(setup, network, device)
        tokenizer = self.tokenizer
        if tokenizer.pad_token_id is None:  # the encoder has checked that EOS exists
            tokenizer.pad_token = tokenizer.eos_token
        self.pad_id = int(tokenizer.pad_token_id)
        self.pad_multiple = pad_multiple(device)
        self.has_types = network.has_token_types
        self.last_token = LastToken(only_virtual=True)
        if network.position_padding_id not in (None, self.pad_id):
            raise RecipeError(
                f"tokenizer: its PAD token has the id {self.pad_id}, but the network computes positions with the PAD "
                f"id {network.position_padding_id}. Use the network's own tokenizer, or remove "
                "model.config.pad_token_id"
            )

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:
        """Raises RecipeError for a network that reads padding, or an encoder-decoder whose tokenizer adds no EOS."""
        refuse_known(config)
        if config.is_encoder_decoder and setup.tokenizer("a").input_ids[-1] != config.eos_token_id:
            raise RecipeError(
                f"tokenizer: {config.model_type} classifies a text at its EOS token, and this tokenizer does not add "
                "EOS. Use the network's own tokenizer, or another network"
            )

    def prepare_network(self, model: PreTrainedModel) -> None:
        """Set the padding token in the config, because decoders classify at the last token that is not padding.

        Also make the exported tokenizer return token_type_ids if the network uses them.
        """
        config = model.config
        if self.has_types and "token_type_ids" not in self.tokenizer.model_input_names:
            names = ["input_ids", "token_type_ids", "attention_mask"]
            self.tokenizer.model_input_names = self.tokenizer.init_kwargs["model_input_names"] = names
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = self.pad_id  # as in T5
        config.get_text_config().pad_token_id = config.pad_token_id = self.pad_id
        if self.auto_class is AutoModelForSequenceClassification:
            self.last_token = LastToken.of(model, only_virtual=not self.ends_by_mask)

    def text_inputs(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Pad on the right: input_ids and attention_mask (1: a token) [B, T]; also token_type_ids if the network has
        token types."""
        inputs = {
            "input_ids": pad([row.input_ids for row in rows], self.pad_id, self.pad_multiple),
            "attention_mask": pad([np.ones(len(row.input_ids), np.int64) for row in rows], 0, self.pad_multiple),
        }
        if self.has_types:
            inputs["token_type_ids"] = pad([row.columns["token_type_ids"] for row in rows], 0, self.pad_multiple)
        return inputs

    def logits(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The logits of the labels: fp32 [B, labels]."""
        self.last_token.mask = inputs["attention_mask"]
        logits: torch.Tensor = model(**network_inputs(inputs)).logits
        return logits.float()

    def probed(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The outputs that must not depend on padding: [B, labels], or [B, T, labels]."""
        return self.logits(model, inputs)

    def probe(self) -> PaddingProbe:
        """The check that a row's outputs do not depend on its padding."""
        rows = [self.probe_row(i, SHORT) for i in range(ROWS)]
        return PaddingProbe(
            self.probed,
            self.text_inputs([*rows, self.probe_row(ROWS, LONG)]),
            self.text_inputs(rows)["input_ids"].shape[1],
            TOLERANCE if self.setup.precision == "fp32" else TOLERANCE_16_BITS,
        )

    def probe_row(self, number: int, length: int) -> Row:
        """A row of random tokens between the tokenizer's special tokens, which some networks need."""
        encoding = self.tokenizer(*["a"] * self.texts)
        frame, types = np.array(encoding.input_ids), np.array(encoding.get("token_type_ids", encoding.attention_mask))
        text = sorted(set(self.tokenizer.get_vocab().values()) - {*self.tokenizer.all_special_ids, self.pad_id})
        position = int(np.flatnonzero(np.isin(frame, text))[-1])
        count = max(0, min(length, self.setup.max_length) - len(frame))
        ids = np.insert(frame, position, np.random.default_rng(number).choice(text, count))
        types = np.insert(types, position, np.full(count, types[position])) * self.has_types
        return Row(ids, np.zeros(1, np.int64), {"token_type_ids": types})
