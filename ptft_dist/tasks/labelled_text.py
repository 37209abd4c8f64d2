"""What classification and regression of texts share: how rows become batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.store import Row
from ptft_dist.tasks import BaseTask, pad, pad_multiple


class LabelledTextTask(BaseTask):
    auto_class = AutoModelForSequenceClassification

    def __init__(
        self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, device: torch.device, facts: Mapping[str, Any]
    ) -> None:
        self.recipe, self.facts = recipe, facts
        self.pad_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.pad_multiple = pad_multiple(device)
        self.has_types = False

    def install(self, model: PreTrainedModel) -> None:
        """Token types are given to networks that tell them apart. Decoders read the last token that is not padding."""
        self.has_types = (getattr(model.config, "type_vocab_size", None) or 0) > 1
        if model.config.get_text_config().pad_token_id is None:
            model.config.get_text_config().pad_token_id = self.pad_id
        model.config.pad_token_id = model.config.get_text_config().pad_token_id

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
