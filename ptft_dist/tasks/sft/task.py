"""Supervised fine-tuning: a causal network learns to predict the assistant's messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from ptft_dist.data.store import Row
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.causal import NextTokenTask
from ptft_dist.tasks.common.generation import (
    PROMPT,
    check_room,
    check_room_left,
    end_ids,
    end_texts_with,
    generate_answers,
    generated_text,
    generation_scores,
    judged_text,
    left_padded,
)
from ptft_dist.tasks.common.padding import pad
from ptft_dist.tasks.protocol import EVALUATION_EPOCH, IGNORE, Batch, Judged, LossOut, TaskSetup


class SupervisedFineTuning(NextTokenTask):
    """Next-token prediction of the tokens that a row's label mask (`learned`) selects."""

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        if self.settings.generation is not None:
            check_room_left(setup, network)
        self.eos_ids = end_ids(setup, network)  # chat models have several
        # Pad generated texts with a special token, because decoding with skip_special_tokens removes only these.
        self.fill_id = self.eos_ids[0] if self.tokenizer.pad_token_id is None else self.pad_id
        self.noise = None if self.settings.neftune_alpha is None else EmbeddingNoise(self.settings.neftune_alpha)

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:
        """Raises RecipeError if generation at evaluations needs more positions than the network has."""
        if setup.settings.generation is not None:
            check_room(setup, config)

    def prepare_network(self, model: PreTrainedModel) -> None:
        super().prepare_network(model)
        end_texts_with(model, self.eos_ids)
        if self.noise is not None:
            model.get_input_embeddings().register_forward_hook(self.noise)

    def next_tokens(self, row: Row) -> np.ndarray:
        ids = row.input_ids[1:]
        learned = row.columns.get("learned")  # None in the rows of the probe: all tokens are targets
        return ids if learned is None else np.where(learned[1:] == 1, ids, IGNORE)

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:
        """NextTokenTask.collate, with the inputs of NEFTune and generation.

        NEFTune adds lengths [B, T]: the number of tokens in each token's conversation. At evaluations, generation adds
        prompt/input_ids and prompt/attention_mask [B, P].
        """
        batch = super().collate(rows, keys)
        inputs = dict(batch.inputs)
        if self.noise is not None:
            inputs["lengths"] = pad([conversation_lengths(row) for row in rows], 1, self.pad_multiple)
        if self.settings.generation is not None and keys and keys[0][0] == EVALUATION_EPOCH:
            prompts = left_padded([np.array(row.meta["prompt"]) for row in rows], self.pad_id, self.pad_multiple)
            inputs |= {PROMPT + name: x for name, x in prompts.items()}
        return replace(batch, inputs=inputs)

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        return super().loss(model, self._set_noise(inputs))

    def choices(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        return super().choices(model, self._set_noise(inputs))

    def _set_noise(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Set the lengths for the noise of the next forward pass; return the inputs without lengths and prompts."""
        if self.noise is not None and "lengths" in inputs:
            self.noise.lengths = inputs["lengths"]
        return {key: x for key, x in inputs.items() if key != "lengths" and not key.startswith(PROMPT)}

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        out = self.loss(model, inputs)
        if self.settings.generation is None:
            return out
        return out._replace(predictions=self.predict(model, inputs))

    def predict(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Generated token ids: int64 [B, max_new_tokens]."""
        return generate_answers(self, model, inputs)

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Scores of the generated answers. predictions: row number -> token ids generated after the prompt."""
        if self.settings.generation is None:
            return {}, []
        return generation_scores(self.tokenizer, self.settings.generation, predictions, row)

    def answer(self, predictions: Sequence[Any], rows: Sequence[Row]) -> Mapping[str, Any]:  # noqa: ARG002
        return {"text": generated_text(self.tokenizer, predictions[0])}

    def judge(self, answer: Mapping[str, Any], rows: Sequence[Row]) -> Judged:
        return judged_text(answer, rows[0], self.settings.generation)


def conversation_lengths(row: Row) -> np.ndarray:
    """The number of tokens in each token's conversation: int64 [T]."""
    lengths = np.diff(row.document_starts, append=len(row.input_ids))
    return np.repeat(lengths, lengths)


class EmbeddingNoise:
    """Forward hook that adds uniform noise to the embeddings in training (NEFTune, Jain et al. 2023, section 3).

    The noise is uniform in [-1, 1], scaled by alpha / sqrt(L d), where L is the number of tokens in the conversation
    without padding, and d is the embedding dimension.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.lengths = torch.ones(1, 1)  # [B, T], set before each forward pass

    def __call__(self, module: torch.nn.Module, _inputs: Any, embeddings: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return embeddings
        scale = self.alpha / (self.lengths * embeddings.size(-1)).sqrt().unsqueeze(-1)
        noise = torch.empty_like(embeddings).uniform_(-1, 1)
        return embeddings + noise * scale.to(embeddings.dtype)
