"""Causal language modelling: predict each token from those before it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.clm.settings import ClmSettings
from ptft_dist.tasks.common.isolation import ROUNDING_TOLERANCE, check_isolation, probe_rows, restarting_positions
from ptft_dist.tasks.common.padding import pad_multiple
from ptft_dist.tasks.protocol import IGNORE, BaseTask, Batch, LossOut
from ptft_dist.tasks.sft.settings import SftSettings


class CausalLM(BaseTask):
    """Rows of token ids in, the summed cross-entropy of next tokens out."""

    auto_class = AutoModelForCausalLM

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
        facts: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> None:
        self.vocab_size = len(tokenizer)
        # What fills rows carries no label and nothing sees it, so any id will do.
        self.pad_id = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self.section, settings = recipe.task, recipe.settings
        assert isinstance(settings, ClmSettings | SftSettings)
        self.isolate = settings.isolated
        self.on_cpu = device.type == "cpu"
        self.fused = settings.head == "fused" or (settings.head == "auto" and not self.on_cpu)
        self.takes_positions = False
        self.pad_multiple = pad_multiple(device)

    @classmethod
    def metric_names(cls, recipe: Recipe) -> Sequence[str]:  # noqa: ARG003
        return "loss", "perplexity"

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """Pad on the right: input_ids, targets (targets[t] is the token after input_ids[t]) and, for packed rows
        whose documents must not see each other, position_ids that restart at every document; all [B, T].

        Right padding needs no attention mask: in a causal network no token sees what stands after it.
        """
        longest = max(len(row.input_ids) for row in rows)
        width = -(-longest // self.pad_multiple) * self.pad_multiple
        input_ids = np.full((len(rows), width), self.pad_id, np.int64)
        targets = np.full((len(rows), width), IGNORE, np.int64)
        for i, row in enumerate(rows):
            n = len(row.input_ids)
            input_ids[i, :n] = row.input_ids
            targets[i, : n - 1] = self.next_tokens(row)
            if self.isolate:
                starts = row.document_starts
                # The last token of a document does not predict the first of the next one.
                targets[i, starts[starts > 0] - 1] = IGNORE
        inputs = {"input_ids": torch.from_numpy(input_ids), "targets": torch.from_numpy(targets)}
        if self.isolate:
            inputs["position_ids"] = torch.from_numpy(restarting_positions(rows, width))
        return Batch(inputs, int((targets != IGNORE).sum()), sum(len(row.input_ids) for row in rows))

    def next_tokens(self, row: Row) -> np.ndarray:
        """What each token but the last is to predict: int64 [T - 1]."""
        return row.input_ids[1:]

    def install(self, model: PreTrainedModel) -> None:
        """Give the network the fused head, if it is wanted; its ordinary forward, and generation, stay as they are."""
        self.takes_positions = "logits_to_keep" in inspect.signature(model.forward).parameters
        if self.fused:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(model)

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        return LossOut(-self.logprobs(model, inputs, self.fused).sum(), {})

    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed cross-entropy, and the number of targets; see tasks/distillation.py."""
        flat = logits.reshape(-1, logits.size(-1)).float()
        loss_sum = F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORE, reduction="sum")
        return loss_sum, (targets != IGNORE).sum()

    def logprobs(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], fused: bool) -> torch.Tensor:
        """log p(targets[t] | tokens up to t), 0 where there is no target: fp32 [B, T]."""
        targets = inputs["targets"]
        if fused:
            network_inputs = {key: x for key, x in inputs.items() if not key.startswith("targets")}
            output = model(**network_inputs, shift_labels=targets, fused_lm_head=True)
            logprobs: torch.Tensor = output.log_probs
            return logprobs
        logits, kept = self.choices(model, inputs)
        flat = F.cross_entropy(
            logits.reshape(-1, logits.size(-1)).float(), kept.reshape(-1), ignore_index=IGNORE, reduction="none"
        )
        if kept.shape == targets.shape:
            return -flat.view(targets.shape)
        everywhere = flat.new_zeros(targets.shape)
        everywhere[:, (targets != IGNORE).any(0)] = -flat.view(kept.shape)
        return everywhere

    def choices(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, P, V] and targets [B, P] at the P positions where any row has a target; on an accelerator, where
        finding them would be waited for, at all T positions."""
        targets = inputs["targets"]
        network_inputs = {key: x for key, x in inputs.items() if not key.startswith("targets")}
        if self.on_cpu and self.takes_positions:
            places = (targets != IGNORE).any(0).nonzero()[:, 0]
            if 0 < len(places) < targets.size(1):
                network_inputs["logits_to_keep"], targets = places, targets[:, places]
        return model(**network_inputs, use_cache=False).logits, targets

    def probe(self) -> DocumentProbe | None:
        return DocumentProbe(self) if self.isolate or self.fused else None

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """loss: mean negative log-likelihood in nats; perplexity: its exponential, up to what a float holds."""
        return {"loss": totals["loss"], "perplexity": math.exp(min(totals["loss"], 700.0))}


@dataclass(frozen=True)
class DocumentProbe:
    """Asks whether documents of a row are kept apart, and whether the fused head reproduces the logits."""

    task: CausalLM

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return self.task.collate(probe_rows(self.task.vocab_size, isolated=self.task.isolate)).inputs

    def outputs(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities [3 rows, T, 2 heads]; the second head is the first one again where none is fused."""
        plain = self.task.logprobs(model, inputs, fused=False)
        fused = self.task.logprobs(model, inputs, fused=True) if self.task.fused else plain
        return torch.stack([plain.float(), fused.float()], dim=-1)

    def check(self, outputs: torch.Tensor) -> None:
        spread = outputs[outputs != 0].std().item()
        if self.task.isolate:
            check_isolation(outputs, spread, self.task.section)
        apart = (outputs[..., 0] - outputs[..., 1]).abs().max().item()
        if not apart <= ROUNDING_TOLERANCE * spread:
            raise RecipeError(
                f"{self.task.section}.head: the fused head does not reproduce this architecture's logits "
                f"(log-probabilities differ by {apart:.2g}): set {self.task.section}.head: logits"
            )
