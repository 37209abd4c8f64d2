"""Learning from a teacher: the task's own loss, and how far the student's probabilities are from the teacher's."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ptft_dist.config.distillation import DistillationSettings
from ptft_dist.data.store import Row
from ptft_dist.tasks.protocol import IGNORE, Batch, LossOut, Probe, Task

METRICS = ("hard_loss", "divergence")


class Distillable(Task, Protocol):
    """A task that chooses from a fixed list: tokens, or labels."""

    pad_id: int
    has_types: bool
    takes_positions: bool

    def choices(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [..., C] and targets: ids [...], -100 where there is none, or a yes or no for each choice [..., C]."""

    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The task's loss, summed, and what it is averaged over."""


class Distillation:
    """A task with a teacher. Both losses are averaged, each over its own count: as the task does, and over all choices
    made. Everything else is the task's own."""

    def __init__(
        self, task: Distillable, settings: DistillationSettings, teacher: PreTrainedModel, order: Sequence[int]
    ) -> None:
        """teacher: frozen, in evaluation mode, on the device. order: which of the teacher's logits belongs to each of
        the student's choices."""
        self.task, self.settings, self.teacher = task, settings, teacher
        self.auto_class = task.auto_class
        self.order = torch.tensor(list(order), device=teacher.device)

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        batch = self.task.collate(rows, keys)
        return replace(batch, more_counts=(float(chosen(batch.inputs["targets"]).sum()),))

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """loss_sum [2]: (1 - hard) and hard shares included."""
        logits, targets = self.task.choices(model, inputs_of(model, inputs))
        with torch.no_grad():
            theirs, _ = self.task.choices(self.teacher, inputs_of(self.teacher, inputs))
        hard_sum, hard_count = self.task.loss_of(logits, targets)
        there = chosen(targets)
        ours, theirs = logits[..., : len(self.order)].float(), theirs.float().index_select(-1, self.order)
        if targets.is_floating_point():  # each label is a choice of its own, between no (0) and yes (its logit)
            ours, theirs = (torch.stack([torch.zeros_like(x), x], -1) for x in (ours, theirs))
        distance = divergence(ours[there], theirs[there], self.settings).sum()
        share, square = self.settings.hard, self.settings.temperature**2
        metrics = {"hard_loss": (hard_sum.detach(), hard_count), "divergence": (distance.detach(), there.sum())}
        return LossOut(torch.stack([share * hard_sum, (1 - share) * square * distance]), metrics)

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        own, with_teacher = self.task.evaluate(model, inputs_of(model, inputs)), self.loss(model, inputs)
        return LossOut(with_teacher.loss_sum, {**own.metrics, **with_teacher.metrics}, own.predictions)

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """What the task makes of its own loss, and both losses."""
        own = {key: value for key, value in totals.items() if key not in METRICS}
        seen = self.task.eval_metrics({**own, "loss": totals["hard_loss"]})
        return {**seen, "loss": totals["loss"], **{name: totals[name] for name in METRICS}}

    def install(self, model: PreTrainedModel) -> None:
        """The student as the task wants it; the teacher reads the same rows, so it must know their padding too."""
        self.task.install(model)
        for config in (self.teacher.config, self.teacher.config.get_text_config()):
            config.pad_token_id = self.task.pad_id
        if tells_types_apart(self.teacher):
            self.task.has_types = True  # what the student does not know is kept from it below
        if "logits_to_keep" not in inspect.signature(self.teacher.forward).parameters:
            self.task.takes_positions = False  # both must give logits at the same positions

    def probe(self) -> Probe | None:
        return self.task.probe()

    def predictions(self, output: torch.Tensor) -> Sequence[Any]:
        return self.task.predictions(output)

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        return self.task.scores(predictions, row)


def tells_types_apart(model: Any) -> bool:
    """Whether the network knows which of two texts a token belongs to."""
    return (getattr(model.config, "type_vocab_size", None) or 0) > 1


def inputs_of(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What this network takes of them: student and teacher may differ in token types."""
    return {key: x for key, x in inputs.items() if key != "token_type_ids" or tells_types_apart(model)}


def chosen(targets: torch.Tensor) -> torch.Tensor:
    """Where a choice is made: bool, the shape of `targets`."""
    return ~targets.isnan() if targets.is_floating_point() else targets != IGNORE


def divergence(ours: torch.Tensor, theirs: torch.Tensor, settings: DistillationSettings) -> torch.Tensor:
    """How far the student's probabilities are from the teacher's, both given as logits [N, C]: nats [N].

    The generalised Jensen-Shannon divergence (Agarwal et al. 2024, "GKD", equation 1) is beta KL(teacher || m) +
    (1 - beta) KL(student || m), where m = beta teacher + (1 - beta) student.
    """
    student = F.log_softmax(ours / settings.temperature, -1)
    teacher = F.log_softmax(theirs / settings.temperature, -1)
    if settings.divergence == "forward_kl":
        return _kl(teacher, student)
    if settings.divergence == "reverse_kl":
        return _kl(student, teacher)
    beta = 0.5 if settings.beta is None else settings.beta
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of log-probabilities [N, C]: [N]."""
    return (p.exp() * (p - q)).sum(-1)
