"""The tasks. One module each, one line each in TASKS; a module holds all that is special to its task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ptft_dist.batches import Batch
from ptft_dist.config.recipe import Recipe
from ptft_dist.data.store import Row

TASKS = {
    "clm": "ptft_dist.tasks.clm:CausalLM",
    "mlm": "ptft_dist.tasks.mlm:MaskedLM",
    "mlm_nsp": "ptft_dist.tasks.mlm_nsp:MaskedLMWithPairs",
    "plm": "ptft_dist.tasks.plm:PermutedLM",
    "span_corruption": "ptft_dist.tasks.span_corruption:SpanCorruption",
    "seq2seq": "ptft_dist.tasks.seq2seq:Seq2Seq",
    "sft": "ptft_dist.tasks.sft:SupervisedFineTuning",
    "classification": "ptft_dist.tasks.classification:Classification",
    "regression": "ptft_dist.tasks.regression:Regression",
    "token_classification": "ptft_dist.tasks.token_classification:TokenClassification",
    "question_answering": "ptft_dist.tasks.question_answering:QuestionAnswering",
}
IGNORE = -100  # a target that counts nothing


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


def pad(rows: Sequence[np.ndarray], value: float, multiple: int = 1) -> torch.Tensor:
    """Arrays of different lengths, filled up on the right: [B, T], T a multiple of `multiple`."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    padded = np.full((len(rows), width), value, rows[0].dtype)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


def pad_multiple(device: torch.device) -> int:
    """Tensor cores want multiples of 8."""
    return 1 if device.type == "cpu" else 8


def task_class(name: str) -> Any:
    """The class that TASKS names; made with (recipe, tokenizer, device, facts), it is a Task."""
    module, attribute = TASKS[name].split(":")
    return getattr(import_module(module), attribute)
