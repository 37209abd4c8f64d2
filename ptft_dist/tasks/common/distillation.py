"""Knowledge distillation: the task's loss and the divergence from a teacher's probabilities (Hinton et al. 2015)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from ptft_dist.config.distillation import DistillationSettings
from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.token_ids import id_count
from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts, labels_of
from ptft_dist.networks.frozen import FrozenSource
from ptft_dist.tasks.common.network_checks import check_same_tokens
from ptft_dist.tasks.protocol import IGNORE, Batch, Judged, LossOut, Probe, Task, TaskSetup


class Teacher(Protocol):
    """A frozen network, placed by the engine; it may be sharded over ranks."""

    def forward(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
        """call(network, inputs), without gradients."""


class Distillable(Task, Protocol):
    """A task that predicts a class from a fixed list: a token or a label."""

    setup: TaskSetup
    network: NetworkFacts
    fused: bool
    pad_id: int
    has_types: bool
    takes_positions: bool

    def choices(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [..., C] and targets: class ids [...], -100 without a target; or multi-label 0/1 [..., C]."""

    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The task's summed loss, and the denominator of its mean."""


class Distillation:
    """Wraps a task and adds the divergence from a teacher to its loss.

    The task's loss and the divergence are averaged separately; the divergence is averaged over predictions. All other
    hooks call those of the task.
    """

    def __init__(self, task: Distillable, settings: DistillationSettings, order: Sequence[int]) -> None:
        """order: the index of the teacher's logit for each class of the student, from `teacher_order`.

        Raises:
            RecipeError: the student is a mixture of experts, whose router loss is not added here.
        """
        self.task, self.settings, self.auto_class = task, settings, task.auto_class
        self.needs_baseline = False
        self.order = torch.tensor(list(order))
        if task.network.router_loss_weight and hasattr(task, "balances_experts"):
            raise RecipeError(
                "distillation: the load balancing loss of a mixture-of-experts student is not added here. Set "
                "model.config.router_aux_loss_coef: 0 to do without it"
            )
        task.fused = False
        self.teacher: Teacher | None = None
        self.teacher_has_types = False

    def adopt(self, role: str, network: Teacher, facts: NetworkFacts) -> None:  # noqa: ARG002
        """Set the teacher after the engine has placed it."""
        self.teacher, self.teacher_has_types = network, facts.has_token_types
        self.student_has_types = self.task.network.has_token_types
        if self.teacher_has_types:
            self.task.has_types = True  # `loss` removes them for a student without token types
        if not facts.takes("logits_to_keep"):
            self.task.takes_positions = False  # both must give logits at the same positions

    def prepare_frozen(self, role: str, model: PreTrainedModel, source: FrozenSource) -> None:  # noqa: ARG002
        """Set the padding token of the rows in the teacher's config."""
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = self.task.pad_id

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        batch = self.task.collate(rows, keys)
        return replace(batch, more_counts=(float(has_choice(batch.inputs["targets"]).sum()),))

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """The summed task loss and the summed divergence, both weighted: loss_sum [2] (Hinton et al. 2015)."""
        assert self.teacher is not None
        logits, targets = self.task.choices(model, self._inputs_of_student(inputs))
        teacher_logits, _ = self.teacher.forward(self.task.choices, _without_types(inputs, self.teacher_has_types))
        hard_sum, hard_count = self.task.loss_of(logits, targets)
        order = self.order.to(logits.device)
        student = logits[..., : len(order)].float()
        teacher = teacher_logits.float().index_select(-1, order)
        counted = has_choice(targets)
        if targets.is_floating_point():  # multi-label: each label is a binary choice with the logits [0, logit]
            student, teacher = (torch.stack([torch.zeros_like(x), x], -1) for x in (student, teacher))
        distance = divergence(student, teacher, self.settings).masked_fill(~counted, 0.0).sum()
        share, square = self.settings.hard, self.settings.temperature**2
        metrics = {"hard_loss": (hard_sum.detach(), hard_count), "divergence": (distance.detach(), counted.sum())}
        return LossOut(torch.stack([share * hard_sum, (1 - share) * square * distance]), metrics)

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        own, with_teacher = self.task.evaluate(model, self._inputs_of_student(inputs)), self.loss(model, inputs)
        metrics = {**own.metrics, **with_teacher.metrics}
        return LossOut(with_teacher.loss_sum, metrics, own.predictions, own.row_losses)

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """The task's metrics, computed from its own loss, with the total loss, hard_loss and divergence."""
        names = self.settings.metric_names
        own = {key: value for key, value in totals.items() if key not in names}
        shown = self.task.eval_metrics({**own, "loss": totals["hard_loss"]})
        return {**shown, "loss": totals["loss"], **{name: totals[name] for name in names}}

    def prepare_network(self, model: PreTrainedModel) -> None:
        self.task.prepare_network(model)

    def extend_network(self, model: Any, section: ModelSection) -> None:
        self.task.extend_network(model, section)

    def longest_rows(self, rows: Sequence[Row]) -> Sequence[Row]:
        return self.task.longest_rows(rows)

    def probe(self) -> Probe | None:
        return self.task.probe()

    def predictions(self, output: torch.Tensor) -> Sequence[Any]:
        return self.task.predictions(output)

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        return self.task.scores(predictions, row)

    def target_ids(self, row: Row) -> np.ndarray | None:
        ids: np.ndarray | None = self.task.target_ids(row)
        return ids

    def before_targets(self, row: Row) -> np.ndarray:
        ids: np.ndarray = self.task.before_targets(row)
        return ids

    def predict(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.task.predict(model, self._inputs_of_student(inputs))

    def answer(self, predictions: Sequence[Any], rows: Sequence[Row]) -> Mapping[str, Any] | None:
        answer: Mapping[str, Any] | None = self.task.answer(predictions, rows)
        return answer

    def judge(self, answer: Mapping[str, Any], rows: Sequence[Row]) -> Judged:
        return self.task.judge(answer, rows)

    def details(self, judged: Sequence[Judged]) -> dict[str, Any]:
        return self.task.details(judged)

    def _inputs_of_student(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return _without_types(inputs, self.student_has_types)


def _without_types(inputs: dict[str, torch.Tensor], has_types: bool) -> dict[str, torch.Tensor]:
    """Remove token_type_ids if the network has none; student and teacher may differ in this."""
    return {key: x for key, x in inputs.items() if key != "token_type_ids" or has_types}


def has_choice(targets: torch.Tensor) -> torch.Tensor:
    """Mask of positions with a label: bool, the shape of `targets`."""
    return ~targets.isnan() if targets.is_floating_point() else targets != IGNORE


def divergence(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, settings: DistillationSettings
) -> torch.Tensor:
    """The divergence between student and teacher, from logits [..., C]: nats [...].

    The generalised Jensen-Shannon divergence (Agarwal et al. 2024, "GKD", equation 1) is beta KL(teacher || m) +
    (1 - beta) KL(student || m), where m = beta teacher + (1 - beta) student.
    """
    student = F.log_softmax(student_logits / settings.temperature, -1)
    teacher = F.log_softmax(teacher_logits / settings.temperature, -1)
    if settings.divergence == "forward_kl":
        return _kl(teacher, student)
    if settings.divergence == "reverse_kl":
        return _kl(student, teacher)
    beta = 0.5 if settings.beta is None else settings.beta
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) in nats, from log-probabilities [..., C]: [...]."""
    return (p.exp() * (p - q)).sum(-1)


def teacher_order(setup: TaskSetup, source: FrozenSource) -> list[int]:
    """The index of the teacher's logit for each token of the tokenizer, or for each label of the data.

    Raises:
        RecipeError: the student computes no logits, or the teacher has another vocabulary, lacks a label, or has too
            few positions.
    """
    if getattr(setup.settings, "head", None) == "fused":
        raise RecipeError(
            f"{setup.name}.head: the fused head computes no logits, and distillation needs them; remove the key, or "
            "set logits"
        )
    check_same_tokens(setup, source)
    check_positions(setup, source)
    if "labels" in setup.survey:
        teacher_ids = {label: i for i, label in enumerate(labels_of(source.config()))}
        missing = [label for label in setup.survey["labels"] if label not in teacher_ids]
        if missing:
            raise RecipeError(
                f"{source.key}: {source.path} has the labels {', '.join(teacher_ids)}, but not {', '.join(missing)}. "
                "Use a teacher that was trained on all labels of the data."
            )
        return [teacher_ids[label] for label in setup.survey["labels"]]
    return list(range(id_count(setup.tokenizer)))


def check_positions(setup: TaskSetup, source: FrozenSource) -> None:
    """Raises RecipeError if data.max_length exceeds the teacher's number of positions."""
    positions = getattr(source.config().get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and 0 < positions < setup.max_length:
        raise RecipeError(
            f"{source.key}: {source.path} has {positions} positions (max_position_embeddings), fewer than "
            f"data.max_length ({setup.max_length}). Lower data.max_length, or use another teacher"
        )
