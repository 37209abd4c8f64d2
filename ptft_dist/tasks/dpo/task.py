"""Direct preference optimization: a causal network learns from pairs of answers, without a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ptft_dist.data.store import Row
from ptft_dist.tasks.common.preference_losses import (
    hinge_loss,
    ipo_loss,
    log_odds_ratio,
    odds_ratio_loss,
    robust_loss,
    sigmoid_loss,
    simpo_loss,
)
from ptft_dist.tasks.common.preference_rows import halves
from ptft_dist.tasks.common.referenced import REFERENCE, Inputs, ReferencedTask
from ptft_dist.tasks.dpo.settings import GAMMA, WITHOUT_REFERENCE, DpoSettings
from ptft_dist.tasks.protocol import IGNORE, Batch, LossOut

PROMPTS = "targets_prompts"
"""Name of the batch input with the targets of the chosen texts' prompts, for ORPO: [B, T]."""


class Answers(NamedTuple):
    """The chosen and rejected answers of a batch."""

    logprobs: torch.Tensor
    """Summed over tokens: fp32 [2, B]."""
    tokens: torch.Tensor
    """Number of tokens: [2, B]."""
    mask: torch.Tensor
    """False for the rows of a dummy batch: bool [B]."""


class DirectPreference(ReferencedTask):
    """One row is one pair. Its loss is one of `preference_losses`; the count is the number of pairs."""

    settings: DpoSettings

    @classmethod
    def reference_width(cls, settings: Any) -> int:  # noqa: ARG003
        return 2

    @classmethod
    def texts_of(cls, row: Row) -> Sequence[np.ndarray]:
        return halves(row.input_ids, row.columns["parts"])

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """Pad the chosen and then the rejected texts, [2B, T]; reference [B, 2] if it is cached.

        ORPO also learns the chosen texts' prompts, as in TRL: targets_prompts [B, T] and a second count, their tokens.
        """
        sides = [halves(row.input_ids, row.columns["parts"]) for row in rows]
        prompts = [int(row.columns["parts"][0]) for row in rows]
        texts = [(pair[side], prompt) for side in (0, 1) for pair, prompt in zip(sides, prompts, strict=True)]
        inputs = self.padded_answers(texts)
        more_counts: tuple[float, ...] = ()
        if REFERENCE in rows[0].columns:
            inputs[REFERENCE] = torch.from_numpy(np.stack([row.columns[REFERENCE] for row in rows]))
        if self.settings.loss == "orpo":
            chosen = self.padded_answers([(ids, 0) for ids, _ in texts[: len(rows)]])["targets"]
            learned = torch.full_like(inputs["targets"][: len(rows)], IGNORE)
            learned[:, : chosen.shape[1]] = chosen
            inputs[PROMPTS] = learned.masked_fill(inputs["targets"][: len(rows)] != IGNORE, IGNORE)
            more_counts = (float((learned != IGNORE).sum()),)
        return Batch(inputs, len(rows), sum(len(row.input_ids) for row in rows), more_counts)

    def start_values(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        return self.answer_logprobs(model, inputs).view(2, -1).T

    def loss(self, model: torch.nn.Module, inputs: Inputs) -> LossOut:
        """The summed loss of the pairs; for ORPO [2], with the negative log-likelihood of the chosen texts."""
        settings, targets = self.settings, inputs["targets"]
        counted, pairs = targets != IGNORE, len(targets) // 2
        # 1. How probable are the answers, for the network and for its reference?
        reference = self.reference_of(model, inputs) if settings.has_reference else None
        if settings.loss == "orpo":
            learned = torch.cat([inputs[PROMPTS], torch.full_like(inputs[PROMPTS], IGNORE)])
            inputs = {**inputs, "targets": targets.where(counted, learned)}
        logprobs = self.token_logprobs(model, inputs)
        answers = Answers(
            (logprobs * counted).sum(1).view(2, pairs), counted.sum(1).view(2, pairs), counted.any(1)[:pairs]
        )
        # 2. The rewards that these probabilities imply, and the loss.
        rewards = self.rewards(answers, reference)
        losses = self.pair_losses(answers, reference).where(answers.mask, 0.0)
        metrics = self.metrics(answers, rewards.detach())
        if settings.loss != "orpo":
            return LossOut(losses.sum(), metrics)
        nll = -logprobs[:pairs].sum()
        log_odds = log_odds_ratio(*self.means(answers)).detach()
        metrics["nll_loss"] = (nll.detach(), (inputs["targets"][:pairs] != IGNORE).sum())
        metrics["log_odds_ratio"] = ((log_odds * answers.mask).sum(), answers.mask.sum())
        return LossOut(torch.stack([settings.beta * losses.sum(), nll]), metrics)

    def reference_of(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The reference's log-probabilities of the chosen and rejected answers: fp32 [2, B]."""
        if REFERENCE in inputs:
            return inputs[REFERENCE].T
        return self.reference_logprobs(model, inputs).view(2, -1)

    def pair_losses(self, answers: Answers, reference: torch.Tensor | None) -> torch.Tensor:
        """The loss of each pair: fp32 [B]. reference: [2, B]; None: the loss has none."""
        settings = self.settings
        if reference is None:
            chosen, rejected = self.means(answers)
            if settings.loss == "orpo":
                return odds_ratio_loss(chosen, rejected)
            gamma = GAMMA if settings.gamma is None else settings.gamma
            return simpo_loss(chosen, rejected, settings.beta, gamma, settings.label_smoothing)
        ratios = answers.logprobs - reference
        if settings.loss == "ipo":
            chosen, rejected = ratios / answers.tokens.clamp(min=1)
            return ipo_loss(chosen, rejected, settings.beta)
        logits = settings.beta * (ratios[0] - ratios[1])
        if settings.loss == "hinge":
            return hinge_loss(logits)
        if settings.loss == "robust":
            return robust_loss(logits, settings.label_smoothing)
        return sigmoid_loss(logits, settings.label_smoothing)

    def rewards(self, answers: Answers, reference: torch.Tensor | None) -> torch.Tensor:
        """beta x log-ratio, or without a reference beta x mean log-probability, as TRL logs them: fp32 [2, B]."""
        values = self.means(answers) if reference is None else answers.logprobs - reference
        return self.settings.beta * values

    def means(self, answers: Answers) -> torch.Tensor:
        """Mean log-probabilities of the answers' tokens: fp32 [2, B]; -1 in a dummy batch, where 0 has no odds."""
        return (answers.logprobs / answers.tokens.clamp(min=1)).where(answers.mask, -1.0)

    def metrics(self, answers: Answers, rewards: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """TRL's metrics; `accuracy` and `margin` are its rewards/accuracies and rewards/margins."""
        logged = self.means(answers) if self.settings.loss in WITHOUT_REFERENCE else answers.logprobs
        values = {
            "accuracy": rewards[0] > rewards[1],
            "margin": rewards[0] - rewards[1],
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "logps/chosen": logged[0].detach(),
            "logps/rejected": logged[1].detach(),
        }
        return {name: ((x * answers.mask).sum(), answers.mask.sum()) for name, x in values.items()}
