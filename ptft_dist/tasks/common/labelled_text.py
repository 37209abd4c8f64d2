"""What classification and regression of texts share: how rows become batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
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
from ptft_dist.tasks.protocol import BaseTask


class LabelledTextTask(BaseTask):
    auto_class: Any = AutoModelForSequenceClassification
    texts = 1  # of a row, for the probe

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device, facts: Mapping[str, Any]
    ) -> None:
        self.recipe, self.facts, self.tokenizer = recipe, facts, tokenizer
        if tokenizer.pad_token_id is None:  # the rows' encoder has seen to an EOS; the exported tokenizer pads so too
            tokenizer.pad_token = tokenizer.eos_token
        self.pad_id = int(tokenizer.pad_token_id)
        self.last_id = tokenizer("a").input_ids[-1]
        self.pad_multiple = pad_multiple(device)
        self.has_types = False

    def install(self, model: PreTrainedModel) -> None:
        """Token types are given to networks that tell them apart, and then by the exported tokenizer too. Decoders read
        the last token that is not padding, so they must know the padding of these rows.

        Raises:
            RecipeError: the network does not go with the tokenizer.
        """
        config = model.config
        refuse_known(config)
        self.has_types = (getattr(config, "type_vocab_size", None) or 0) > 1
        if self.has_types and "token_type_ids" not in self.tokenizer.model_input_names:
            names = ["input_ids", "token_type_ids", "attention_mask"]
            self.tokenizer.model_input_names = self.tokenizer.init_kwargs["model_input_names"] = names
        counted_from = [
            module.padding_idx
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        ]
        if counted_from and counted_from[0] != self.pad_id:
            raise RecipeError(
                f"tokenizer: its PAD token is {self.pad_id}, the network's {counted_from[0]}, and this network counts "
                "positions by it. Use the tokenizer that belongs to the network, or leave model.config.pad_token_id out"
            )
        if config.is_encoder_decoder and self.last_id != config.eos_token_id:
            raise RecipeError(
                f"tokenizer: {config.model_type} reads a text's meaning at its EOS token, and this tokenizer puts none "
                "at the end. Use the tokenizer that belongs to the network, or another network"
            )
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
        logits: torch.Tensor = model(**{k: x for k, x in inputs.items() if not k.startswith("targets")}).logits
        return logits.float()

    def probed(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What must not depend on padding: [B, labels], or [B, T, labels]."""
        return self.logits(model, inputs)

    def probe(self) -> PaddingProbe:
        rows = [self.probe_row(i, SHORT) for i in range(ROWS)]
        return PaddingProbe(
            self.probed,
            self.text_inputs([*rows, self.probe_row(ROWS, LONG)]),
            self.text_inputs(rows)["input_ids"].shape[1],
            TOLERANCE if self.recipe.train.precision == "fp32" else TOLERANCE_16_BITS,
        )

    def probe_row(self, number: int, length: int) -> Row:
        """A made-up text between the tokenizer's special tokens, which some networks look for."""
        encoding = self.tokenizer(*["a"] * self.texts)
        frame, types = np.array(encoding.input_ids), np.array(encoding.get("token_type_ids", encoding.attention_mask))
        text = sorted(set(self.tokenizer.get_vocab().values()) - {*self.tokenizer.all_special_ids, self.pad_id})
        place = int(np.flatnonzero(np.isin(frame, text))[-1])
        count = max(0, min(length, self.recipe.data.max_length) - len(frame))
        ids = np.insert(frame, place, np.random.default_rng(number).choice(text, count))
        types = np.insert(types, place, np.full(count, types[place])) * self.has_types
        return Row(ids, np.zeros(1, np.int64), {"token_type_ids": types})
