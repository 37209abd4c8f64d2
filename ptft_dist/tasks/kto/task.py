"""Kahneman-Tversky optimization: a causal network learns from answers that are labelled desirable or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ptft_dist.data.store import Row
from ptft_dist.tasks.common.preference_losses import apo_zero_unpaired_loss, kto_loss
from ptft_dist.tasks.common.referenced import REFERENCE, Inputs, ReferencedTask
from ptft_dist.tasks.kto.settings import KtoSettings
from ptft_dist.tasks.protocol import BASELINE, IGNORE, Batch, LossOut

LABELS = "targets_desirable"
"""Name of the batch input with the labels: fp32 [B], 1 if the answer is desirable, NaN in a dummy batch."""
OTHER = "other/"
"""Prefix of the batch inputs of mismatched texts: the row's prompt with the answer of another row."""


class KahnemanTversky(ReferencedTask):
    """One row is one answer; the count is the number of answers.

    The loss of an answer is nonlinear in z, an estimate of the KL divergence from the reference. z is the mean
    log-ratio of mismatched texts over all rows of the update, but not below 0. It is measured before the update, see
    `baseline`, so it does not depend on the split. TRL's z is that of one micro-batch of all ranks.
    """

    settings: KtoSettings

    @classmethod
    def reference_width(cls, settings: Any) -> int:
        return 2 if settings.estimates_kl else 1

    @property
    def needs_baseline(self) -> bool:
        return self.settings.estimates_kl

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """Pad prompts with answers, [B, T], and with the answers of other rows: other/... [B, T2].
        reference [B, 2] if it is cached."""
        prompts = [int(row.columns["parts"][0]) for row in rows]
        inputs = self.padded_answers([(row.input_ids, n) for row, n in zip(rows, prompts, strict=True)])
        inputs[LABELS] = torch.tensor([float(row.columns["desirable"][0]) for row in rows])
        if self.settings.estimates_kl:
            others = [
                (np.concatenate([row.input_ids[:n], row.columns["other"]])[: self.setup.max_length], n)
                for row, n in zip(rows, prompts, strict=True)
            ]
            padded = self.padded_answers(others)
            inputs |= {OTHER + "input_ids": padded["input_ids"], "targets_other": padded["targets"]}
        if REFERENCE in rows[0].columns:
            inputs[REFERENCE] = torch.from_numpy(np.stack([row.columns[REFERENCE] for row in rows]))
        return Batch(inputs, len(rows), sum(len(row.input_ids) for row in rows))

    def start_values(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        texts = [inputs, _mismatched(inputs)] if self.settings.estimates_kl else [inputs]
        return torch.stack([self.answer_logprobs(model, each) for each in texts], 1)

    def baseline(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The summed log-ratio of the mismatched texts, and their number: fp32 [2]."""
        texts = _mismatched(inputs)
        ratios = self.answer_logprobs(model, texts) - self.reference_of(model, inputs, 1)
        mask = (texts["targets"] != IGNORE).any(1)
        return torch.stack([(ratios * mask).sum(), mask.sum().float()])

    def reference_of(self, model: torch.nn.Module, inputs: Inputs, column: int) -> torch.Tensor:
        """The reference's log-probabilities, fp32 [B], of the answers (column 0) or of the mismatched ones (1)."""
        if REFERENCE in inputs:
            return inputs[REFERENCE][:, column]
        return self.reference_logprobs(model, _mismatched(inputs) if column else inputs)

    def loss(self, model: torch.nn.Module, inputs: Inputs) -> LossOut:
        """The summed loss of the answers. inputs: with `baseline`, the mean log-ratio of mismatched texts; without it
        z is 0."""
        settings, labels = self.settings, inputs[LABELS]
        mask, desirable = ~labels.isnan(), labels == 1
        reference = self.reference_of(model, inputs, 0)
        logprobs = self.answer_logprobs(model, inputs)
        ratios = logprobs - reference
        baseline = inputs.get(BASELINE, ratios.new_zeros(())).clamp(min=0)
        if settings.estimates_kl:
            losses = kto_loss(ratios, desirable, baseline, settings.beta)
        else:
            losses = apo_zero_unpaired_loss(ratios, desirable, settings.beta)
        weights = torch.where(desirable, settings.desirable_weight, settings.undesirable_weight)
        metrics = {}
        for side, chosen in (("chosen", desirable & mask), ("rejected", ~desirable & mask)):
            for name, values in (("rewards", settings.beta * ratios), ("logps", logprobs)):
                metrics[f"{name}/{side}"] = ((values.detach() * chosen).sum(), chosen.sum())
        if settings.estimates_kl:
            metrics["kl"] = (baseline * mask.sum(), mask.sum())
        return LossOut((losses * weights * mask).sum(), metrics)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def evaluate(self, model: torch.nn.Module, inputs: Inputs) -> LossOut:
        """The log-ratios, log-probabilities and labels, and with kto the log-ratios of the mismatched texts, as
        predictions [B, 3 or 4]. `scores` computes the loss, because it depends on all validation rows."""
        logprobs = self.answer_logprobs(model, inputs)
        columns = [logprobs - self.reference_of(model, inputs, 0), logprobs, inputs[LABELS]]
        if self.settings.estimates_kl:
            others = self.answer_logprobs(model, _mismatched(inputs))
            columns.append(others - self.reference_of(model, inputs, 1))
        return LossOut(logprobs.new_zeros(()), {}, torch.stack(columns, 1))

    def scores(
        self,
        predictions: Mapping[int, Any],
        row: Callable[[int], Row],  # noqa: ARG002
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Loss and metrics of the validation rows; z is that of all of them. predictions: see `evaluate`."""
        settings, columns = self.settings, torch.tensor(list(predictions.values()), dtype=torch.float64).T
        ratios, logprobs, desirable = columns[0], columns[1], columns[2] == 1
        baseline = columns[3].mean().clamp(min=0) if settings.estimates_kl else ratios.new_zeros(())
        weights = torch.where(desirable, settings.desirable_weight, settings.undesirable_weight)
        found = {"loss": float((kto_loss(ratios, desirable, baseline, settings.beta) * weights).mean())}
        for name, values in (("rewards", settings.beta * ratios), ("logps", logprobs)):
            for side, chosen in (("chosen", desirable), ("rejected", ~desirable)):
                found[f"{name}/{side}"] = float(values[chosen].sum() / max(int(chosen.sum()), 1))
        found["margin"] = found["rewards/chosen"] - found["rewards/rejected"]
        return found | ({"kl": float(baseline)} if settings.estimates_kl else {}), []


def _mismatched(inputs: Inputs) -> Inputs:
    """The mismatched texts of a batch as inputs of the network."""
    return {"input_ids": inputs[OTHER + "input_ids"], "targets": inputs["targets_other"]}
