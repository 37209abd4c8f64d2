"""Sequence-to-sequence learning with an encoder-decoder network: translation, summarization, rewriting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.generation import generate, generated_text, generation_scores, judged_text
from ptft_dist.tasks.common.losses import network_inputs, perplexity, row_losses
from ptft_dist.tasks.common.padding import pad, pad_multiple
from ptft_dist.tasks.protocol import IGNORE, BaseTask, Batch, Judged, LossOut, TaskSetup
from ptft_dist.tasks.seq2seq.languages import mark_of_targets


class Seq2Seq(BaseTask):
    """Sources and targets -> summed cross-entropy of the target tokens, EOS included."""

    auto_class = AutoModelForSeq2SeqLM

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.pad_id, self.eos_id = int(self.tokenizer.pad_token_id), int(self.tokenizer.eos_token_id)
        self.pad_multiple = pad_multiple(device)
        if network.decoder_start_id is None:
            raise RecipeError(
                f"model.path: the config of this {network.model_type} network has no decoder_start_token_id, and the "
                "decoder needs one. Set it in its config.json."
            )
        self.start_id = network.decoder_start_id
        self.mark = mark_of_targets(self.tokenizer, self.settings)

    def prepare_network(self, model: PreTrainedModel) -> None:
        """Texts that the network generates are in the target's language."""
        super().prepare_network(model)
        if self.mark is None or model.generation_config is None:
            return
        if self.mark.first:
            model.generation_config.forced_bos_token_id = self.mark.token_id
        else:
            model.generation_config.decoder_start_token_id = self.mark.token_id

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:
        """Set the decoder's special token ids of a new network, and record the source format in the config.

        A model type's default ids belong to another vocabulary. The decoder starts with the padding token, as in T5,
        unless the recipe sets another one. `ptft generate` reads the source format from task_specific_params.

        Raises:
            RecipeError: the network is not an encoder-decoder, or has too few positions.
        """
        if not config.is_encoder_decoder:
            raise RecipeError(
                f"model: task seq2seq needs an encoder-decoder network, and {config.model_type} is not one: use t5, "
                "mt5, bart, marian, ..., or task: sft"
            )
        if (given := setup.config_keys) is not None:
            if "decoder_start_token_id" not in given:
                config.decoder_start_token_id = setup.tokenizer.pad_token_id
            for key in ("forced_bos_token_id", "forced_eos_token_id"):
                if key not in given and hasattr(config, key):
                    setattr(config, key, None)
        mark = mark_of_targets(setup.tokenizer, setup.settings)
        if mark is not None and not mark.first:  # mBART decodes from the language, which is the last token of a target
            config.decoder_start_token_id = mark.token_id
        source = {"prefix": setup.settings.prefix, "source_eos": True}
        config.task_specific_params = {**(getattr(config, "task_specific_params", None) or {}), "ptft": source}
        lengths = {"seq2seq.max_target_length": setup.settings.max_target_length}
        if setup.settings.generation is not None:
            lengths["seq2seq.generation.max_new_tokens"] = setup.settings.generation.max_new_tokens
        positions = getattr(config, "max_position_embeddings", None)
        for name, length in lengths.items():
            if isinstance(positions, int) and 0 < positions < length:
                raise RecipeError(
                    f"{name}: {length} exceeds the model's max_position_embeddings ({positions}): lower {name}, or "
                    "raise max_position_embeddings"
                )

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """Pad on the right: input_ids and attention_mask (1: a token) [B, S]; targets and decoder_input_ids [B, T].

        decoder_input_ids are the targets shifted right by one, after the decoder's start token. The decoder needs no
        mask, because its tokens do not attend to later tokens.
        """
        labels = [row.columns["labels"] for row in rows]
        shifted = [np.concatenate(([self.start_id], ids[:-1])) for ids in labels]
        inputs = {
            "input_ids": pad([row.input_ids for row in rows], self.pad_id, self.pad_multiple),
            "attention_mask": pad([np.ones_like(row.input_ids) for row in rows], 0, self.pad_multiple),
            "decoder_input_ids": pad(shifted, self.pad_id, self.pad_multiple),
            "targets": pad(labels, IGNORE, self.pad_multiple),
        }
        count = sum(map(len, labels))
        return Batch(inputs, count, count + sum(len(row.input_ids) for row in rows))

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        return self._loss(model, inputs, self.settings.label_smoothing)

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """The loss without label smoothing, so that its exponential is the perplexity, and the generated token ids."""
        out = self._loss(model, inputs, 0.0)
        if self.settings.generation is None:
            return out
        return out._replace(predictions=self.predict(model, inputs))

    def predict(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Generated token ids: int64 [B, max_new_tokens]."""
        source = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        return generate(
            model,
            source,
            self.settings.generation,
            pad_id=self.pad_id,
            eos_ids=[self.eos_id],
            tokenizer=self.tokenizer,
        )

    @staticmethod
    def _loss(model: torch.nn.Module, inputs: dict[str, torch.Tensor], smoothing: float) -> LossOut:
        targets = inputs["targets"]
        logits = model(**network_inputs(inputs), use_cache=False).logits.float().flatten(0, 1)
        losses = F.cross_entropy(
            logits, targets.flatten(), ignore_index=IGNORE, reduction="none", label_smoothing=smoothing
        )
        mask = targets.flatten() != IGNORE
        correct = (logits.argmax(-1) == targets.flatten()) & mask
        rows = row_losses(losses.detach().view(targets.shape), targets)
        return LossOut(losses.sum(), {"accuracy": (correct.sum(), mask.sum())}, row_losses=rows)

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Add the perplexity. loss: mean over the target tokens, in nats; accuracy: the fraction of target tokens
        predicted correctly, with teacher forcing."""
        return {**totals, "perplexity": perplexity(totals["loss"])}

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Scores of the generated texts. predictions: row number -> generated token ids."""
        if self.settings.generation is None:
            return {}, []
        return generation_scores(self.tokenizer, self.settings.generation, predictions, row)

    def target_ids(self, row: Row) -> np.ndarray:
        return row.columns["labels"]

    def answer(self, predictions: Sequence[Any], rows: Sequence[Row]) -> Mapping[str, Any]:  # noqa: ARG002
        return {"text": generated_text(self.tokenizer, predictions[0])}

    def judge(self, answer: Mapping[str, Any], rows: Sequence[Row]) -> Judged:
        return judged_text(answer, rows[0], self.settings.generation)
