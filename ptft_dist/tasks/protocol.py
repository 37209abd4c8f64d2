"""What a task is: the interface between the training loop and everything that is special to one task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.store import Row

IGNORE = -100  # a target that counts nothing


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    inputs: tensors [B, ...] for the task's loss; count: what the loss is averaged over (for language models, the
    tokens that carry a label); tokens: tokens read, padding left out; more_counts: what further losses of the same
    task are averaged over; rows: which rows of the store these are, none for the stand-in of a rank without rows.
    """

    inputs: dict[str, torch.Tensor]
    count: float
    tokens: int
    more_counts: tuple[float, ...] = ()
    rows: tuple[int, ...] = ()

    @property
    def counts(self) -> tuple[float, ...]:
        """One for each loss."""
        return (self.count, *self.more_counts)


Collate = Callable[[Sequence[Row], Sequence[tuple[int, int]]], Batch]
"""Rows, and for each the key (epoch, row) that everything drawn at random for it follows from."""
EVALUATION_EPOCH = 2**32 - 1
"""The epoch of validation rows: what is drawn for them is the same at every evaluation."""


class LossOut(NamedTuple):
    """loss_sum: the loss summed, not averaged, over what Batch.count counts ([K] for a task with K losses and
    counts); metrics: name -> (total, count); predictions: [B, ...], for scores that are no averages."""

    loss_sum: torch.Tensor
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]
    predictions: torch.Tensor | None = None


class Task(Protocol):
    """What is special to a task. It owns no optimizer and no loop. `BaseTask` has what most tasks have in common."""

    auto_class: Any
    """The transformers class that builds the network."""

    @classmethod
    def metric_names(cls, recipe: Recipe) -> Sequence[str]:
        """What eval_metrics and scores return: the choice for eval.metric."""

    @classmethod
    def model_settings(cls, recipe: Recipe, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of the network's config that follow from the task, such as the labels."""

    @classmethod
    def fit_config(cls, recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        """Before there is a network: add ids of special tokens to its config, or raise RecipeError if this kind of
        network or tokenizer cannot learn the task."""

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """keys: (epoch, row) of each row; whatever is drawn at random is a function of it and the seed."""

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut: ...
    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """As `loss`, in evaluation mode and with predictions, if the task scores them."""

    def install(self, model: PreTrainedModel) -> None: ...
    def probe(self) -> Probe | None: ...
    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """From `loss` and the averages of LossOut.metrics, to what is logged."""

    def predictions(self, output: torch.Tensor) -> Sequence[Any]:
        """LossOut.predictions as one plain object a row, to be brought together from all ranks."""

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics over all predictions, by row number in order, and samples to show."""


class Probe(Protocol):
    """A question put to the network before training, on made-up input; `check` raises RecipeError at a bad answer."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]: ...

    def outputs(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor: ...
    def check(self, outputs: torch.Tensor) -> None: ...


class BaseTask:
    """What tasks that need nothing special answer. A task is made with (recipe, tokenizer, device, facts)."""

    @classmethod
    def model_settings(cls, recipe: Recipe, facts: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG003
        return {}

    @classmethod
    def fit_config(cls, recipe: Recipe, config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None: ...

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        raise NotImplementedError

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        return self.loss(model, inputs)

    def install(self, model: PreTrainedModel) -> None: ...

    def probe(self) -> Probe | None:
        return None

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        return totals

    def predictions(self, output: torch.Tensor) -> Sequence[Any]:
        return output.tolist()

    def scores(
        self,
        predictions: Mapping[int, Any],  # noqa: ARG002
        row: Callable[[int], Row],  # noqa: ARG002
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        return {}, []
