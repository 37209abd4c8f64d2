"""Shared by tasks with labelled texts: collating texts, and the check that the network ignores padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
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
    texts = 1  # texts per row, for the probe

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        """Raises RecipeError if network and tokenizer have different padding tokens."""
        super().__init__(setup, network, device)
        tokenizer = self.tokenizer
        if tokenizer.pad_token_id is None:  # the encoder has checked that there is an EOS; the export pads so too
            tokenizer.pad_token = tokenizer.eos_token
        self.pad_id = int(tokenizer.pad_token_id)
        self.pad_multiple = pad_multiple(device)
        self.has_types = network.has_token_types
        if network.position_padding_id not in (None, self.pad_id):
            raise RecipeError(
                f"tokenizer: its PAD token is {self.pad_id}, the network's {network.position_padding_id}, and this "
                "network counts positions by it. Use the tokenizer that belongs to the network, or leave "
                "model.config.pad_token_id out"
            )

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:
        """Raises RecipeError for a network that reads padding, or an encoder-decoder whose tokenizer adds no EOS."""
        refuse_known(config)
        if config.is_encoder_decoder and setup.tokenizer("a").input_ids[-1] != config.eos_token_id:
            raise RecipeError(
                f"tokenizer: {config.model_type} classifies a text at its EOS token, and this tokenizer adds none "
                "at the end. Use the tokenizer that belongs to the network, or another network"
            )

    def prepare_network(self, model: PreTrainedModel) -> None:
        """Set the padding token in the config, because decoders classify at the last token that is not padding. The
        exported tokenizer returns token types if the network uses them."""
        config = model.config
        if self.has_types and "token_type_ids" not in self.tokenizer.model_input_names:
            names = ["input_ids", "token_type_ids", "attention_mask"]
            self.tokenizer.model_input_names = self.tokenizer.init_kwargs["model_input_names"] = names
        if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = self.pad_id  # as T5's own
        config.get_text_config().pad_token_id = config.pad_token_id = self.pad_id

    def text_inputs(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask (1: a token) [B, T]; token_type_ids, where the network has them."""
        inputs = {
            "input_ids": pad([row.input_ids for row in rows], self.pad_id, self.pad_multiple),
            "attention_mask": pad([np.ones(len(row.input_ids), np.int64) for row in rows], 0, self.pad_multiple),
        }
        if self.has_types:
            inputs["token_type_ids"] = pad([row.columns["token_type_ids"] for row in rows], 0, self.pad_multiple)
        return inputs

    @staticmethod
    def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """fp32 [B, labels]."""
        logits: torch.Tensor = model(**network_inputs(inputs)).logits
        return logits.float()

    def probed(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The outputs that must not depend on padding: [B, labels], or [B, T, labels]."""
        return self.logits(model, inputs)

    def probe(self) -> PaddingProbe:
        rows = [self.probe_row(i, SHORT) for i in range(ROWS)]
        return PaddingProbe(
            self.probed,
            self.text_inputs([*rows, self.probe_row(ROWS, LONG)]),
            self.text_inputs(rows)["input_ids"].shape[1],
            TOLERANCE if self.setup.precision == "fp32" else TOLERANCE_16_BITS,
        )

    def probe_row(self, number: int, length: int) -> Row:
        """A made-up text between the tokenizer's special tokens, which some networks need."""
        encoding = self.tokenizer(*["a"] * self.texts)
        frame, types = np.array(encoding.input_ids), np.array(encoding.get("token_type_ids", encoding.attention_mask))
        text = sorted(set(self.tokenizer.get_vocab().values()) - {*self.tokenizer.all_special_ids, self.pad_id})
        place = int(np.flatnonzero(np.isin(frame, text))[-1])
        count = max(0, min(length, self.setup.max_length) - len(frame))
        ids = np.insert(frame, place, np.random.default_rng(number).choice(text, count))
        types = np.insert(types, place, np.full(count, types[place])) * self.has_types
        return Row(ids, np.zeros(1, np.int64), {"token_type_ids": types})
