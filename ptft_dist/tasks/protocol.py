"""The interface between the training loop and a task.

When each hook of a task is called, and on which ranks:

    once, before a process group exists, on every rank
        frozen_roles(setup, model)  frozen networks that the task reads, such as a reference or reward models
        check_setup(setup, frozen)  refuse frozen networks, and functions that the recipe names, which do not fit
        start_column(setup, model)  numbers about each row that the network gives before it is trained
        config_settings(setup)      keys of the network's config that follow from the task
        fit_config(setup, config)   refuse networks and tokenizers that cannot learn the task
    once, after the network was built and before it is wrapped, on every rank
        Task(setup, network, device)
        start_values(model, inputs) the numbers of start_column; once for all rows, on a copy of the network
        prepare_network(model)      what the task changes in the network: a fused head, hooks, ids in its config
        texts_of(row)               the texts of training rows, for initial values of an adapter (EVA)
        extend_network(model, ...)  after it was adapted: parts that are trained beside it, such as a value head
    once, after the network was wrapped, on every rank
        prepare_frozen, adopt       each frozen network, before and after the engine has placed it
        probe()                     a check on test input, such as: does attention stay within packed documents?
    every update, on every rank (collate also in data-loader workers)
        collate(rows, keys)         rows of one micro-batch -> Batch
        baseline(model, inputs)     a mean over the whole update that its loss needs, without gradients
        loss(model, inputs)         forward pass -> summed loss
    every evaluation, on every rank
        collate, evaluate(model, inputs), predictions(output)
        eval_metrics(totals)        from averages over all ranks
        scores(predictions, row)    rank 0 only: metrics that are not averages, and samples
ptft evaluate and ptft predict, rank 0 only, except for predict
        predict(model, inputs)      what evaluate predicts, for ptft predict
        answer(predictions, rows)   what the predictions for the rows of one example say
        judge(answer, rows)         the answer beside the reference
        details(judged)             tables about all examples
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ptft_dist.config.recipe import ModelSection, Recipe
from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.networks.frozen import FrozenSource

IGNORE = -100
"""The target id of positions without a label."""
BASELINE = "baseline"
"""Name of the batch input with the mean of Task.baseline over the rows of the update: a scalar."""
EVALUATION_EPOCH = 2**32 - 1
"""The epoch of validation rows, so that random masks are the same at every evaluation."""
FISHER_EPOCH = 2**32 - 2
"""The epoch of old training rows, for their Fisher information."""


@dataclass(frozen=True)
class FrozenRole:
    """A frozen network that a task reads."""

    key: str
    """The recipe's key that names it, for messages."""
    path: str
    """A directory or a Hub name."""
    revision: str | None
    auto_class: Any
    """The transformers class that builds it."""
    shared: bool = False
    """It is an adapter on the base of the trained network, which the task adds there itself."""


class StartColumn(NamedTuple):
    """A column of the rows that is computed with the network that training starts from."""

    name: str
    width: int
    """The number of values of each row."""


@dataclass(frozen=True)
class TaskSetup:
    """The arguments of a task that are known before the network is built."""

    name: str
    """The task's name and section in the recipe, for messages."""
    settings: Any
    """The recipe's section: the task's own settings."""
    tokenizer: PreTrainedTokenizerBase
    survey: Mapping[str, Any]
    """Properties of the training rows from the encoder, such as the labels."""
    max_length: int
    """Maximum number of tokens in a row."""
    seed: int
    precision: str
    """fp32, bf16 or fp16."""
    model: ModelSection
    """How the trained network is loaded. Networks beside it are loaded with the same attention and trust."""
    learned_tokenizer: bool
    """The tokenizer was trained on the training texts."""
    base: Path = Path()
    """The recipe's directory, where relative paths start."""

    @property
    def config_keys(self) -> frozenset[str] | None:
        """The keys of model.config in the recipe; None: the network is pretrained."""
        return None if self.model.config is None else frozenset(self.model.config)

    @classmethod
    def of(
        cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, survey: Mapping[str, Any], base: Path = Path()
    ) -> TaskSetup:
        """The setup of a recipe. survey: properties of the training rows, from the encoder."""
        return cls(
            name=recipe.task,
            settings=recipe.settings,
            tokenizer=tokenizer,
            survey=survey,
            max_length=recipe.data.max_length,
            seed=recipe.train.seed,
            precision=recipe.train.precision,
            model=recipe.model,
            learned_tokenizer=recipe.tokenizer.train is not None,
            base=base,
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    inputs: dict[str, torch.Tensor]
    """Tensors [B, ...] for the task's loss."""
    count: float
    """The denominator of the mean loss: for language models, the number of tokens with a label."""
    tokens: int
    """Number of tokens without padding."""
    more_counts: tuple[float, ...] = ()
    """The denominators of further losses of the same task."""
    rows: tuple[int, ...] = ()
    """Which rows of the store these are; empty for the dummy batch of a rank without rows."""

    @property
    def counts(self) -> tuple[float, ...]:
        """The denominators of all losses."""
        return (self.count, *self.more_counts)

    def pin_memory(self) -> Batch:
        """Called by PyTorch's DataLoader with pin_memory, so that copies to the device are asynchronous."""
        return replace(self, inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()})


Collate = Callable[[Sequence[Row], Sequence[tuple[int, int]]], Batch]
"""(rows, keys) -> Batch. Everything random about a row is a function of its key (epoch, row) and the seed."""


class LossOut(NamedTuple):
    """The result of a forward pass."""

    loss_sum: torch.Tensor
    """The summed loss, whose mean has the denominator Batch.count; [K] for a task with K losses."""
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Name -> (total, count)."""
    predictions: torch.Tensor | None = None
    """[B, ...], for metrics that are not averages."""
    row_losses: torch.Tensor | None = None
    """The summed loss of each row, without weights between several losses, and its count: [B, 2]. For `ptft evaluate`;
    None if the task has none."""


@dataclass(frozen=True)
class Judged:
    """The answer to one example beside its reference."""

    answer: Mapping[str, Any]
    """As `Task.answer` returns it."""
    reference: Any
    """As JSON."""
    values: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Name of a metric -> total and count; the metric of many examples is the sum of totals over that of counts."""


class Task(Protocol):
    """The hooks of a task. It owns no optimizer and no loop. `BaseTask` implements the hooks that most tasks share."""

    auto_class: Any
    """The transformers class that builds the network."""

    @classmethod
    def config_settings(cls, setup: TaskSetup) -> dict[str, Any]:
        """Keys of the network's config that follow from the task, such as the labels. Raises RecipeError."""

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:
        """Set special token ids in a network's config. Raises RecipeError if this type of network or tokenizer is not
        suitable for the task."""

    @classmethod
    def frozen_roles(cls, setup: TaskSetup, section: ModelSection) -> dict[str, FrozenRole]:
        """The frozen networks by role. section: model, of the trained network. Raises RecipeError."""

    @classmethod
    def check_setup(cls, setup: TaskSetup, frozen: Mapping[str, FrozenSource]) -> None:
        """Check what can be known of frozen networks (by role) and of functions that the recipe names. Raises
        RecipeError."""

    @classmethod
    def named_files(cls, setup: TaskSetup) -> dict[str, Path]:
        """Files that the recipe names by other means than a path, by key, such as modules of reward functions. A run
        resumes only with the same contents."""

    @classmethod
    def start_column(cls, setup: TaskSetup, section: ModelSection) -> StartColumn | None:
        """The column that `start_values` computes for all rows, before training and once for all runs; None: no column.

        section: model, of the network that training starts from.
        """

    @classmethod
    def texts_of(cls, row: Row) -> Sequence[np.ndarray]:
        """The token ids of the texts of a row, one or several."""

    def start_values(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The values of `start_column` for the rows of a batch: fp32 [B, width]."""

    def prepare_network(self, model: PreTrainedModel) -> None:
        """Change the unwrapped network as the task needs it. Raises RecipeError."""

    def extend_network(self, model: Any, section: ModelSection) -> None:
        """Add parts to the adapted network. section: model, of the recipe. Raises RecipeError."""

    def prepare_frozen(self, role: str, model: PreTrainedModel, source: FrozenSource) -> None:
        """Change a frozen network as the task needs it, before the engine places it. Raises RecipeError."""

    def adopt(self, role: str, network: Any, facts: NetworkFacts) -> None:
        """Take a frozen network that the engine has placed: an engine.FrozenNetwork."""

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """Collate rows into a batch. keys: (epoch, row) of each row; random choices depend only on key and seed."""

    def longest_rows(self, rows: Sequence[Row]) -> Sequence[Row]:
        """Rows for `collate` that need the most memory in an update. rows: the longest ones of the store."""

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """The summed loss of one micro-batch, whose inputs are on the device. It must not wait for the device."""

    @property
    def needs_baseline(self) -> bool:
        """Whether `loss` needs the mean of `baseline` over all rows of the update, as the input `baseline`."""

    def baseline(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Total and count over the rows of one micro-batch: fp32 [2], in evaluation mode and without gradients."""

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """As `loss`, in evaluation mode, with predictions if the task scores them."""

    def probe(self) -> Probe | None:
        """A check of the wrapped network before training; None: no check."""

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """The logged metrics, from `loss` and the averages of LossOut.metrics."""

    def predictions(self, output: torch.Tensor) -> Sequence[Any]:
        """LossOut.predictions as one plain object per row, to be gathered from all ranks."""

    def scores(
        self, predictions: Mapping[int, Any], row: Callable[[int], Row]
    ) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Metrics over all predictions (row number -> prediction, in order), and samples to show."""

    def predict(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The predictions of `evaluate`, without the rest."""

    def answer(self, predictions: Sequence[Any], rows: Sequence[Row]) -> Mapping[str, Any] | None:
        """The answer to one example as JSON, from the predictions for all its rows; None: the task gives no answers.

        For example a label with probabilities, a tag for each word, or a text.
        """

    def judge(self, answer: Mapping[str, Any], rows: Sequence[Row]) -> Judged:
        """Compare the answer to one example with the reference in the meta of its rows."""

    def target_ids(self, row: Row) -> np.ndarray | None:
        """The tokens whose negative log-likelihood is the row's loss, in order; None if the loss is something else."""

    def before_targets(self, row: Row) -> np.ndarray:
        """The token before `target_ids` in the text, at most one: decoders remove the space of a first token."""

    def details(self, judged: Sequence[Judged]) -> dict[str, Any]:
        """Tables about all examples as JSON, by name, such as the scores of each label."""


class Probe(Protocol):
    """A check of the network before training, on test input; `check` raises RecipeError if it fails."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]: ...

    def outputs(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor: ...
    def check(self, outputs: torch.Tensor) -> None: ...


class BaseTask:
    """Default implementations of the hooks."""

    adds_router_loss = False
    """The loss includes the load balancing loss of a mixture of experts."""

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        """Raises RecipeError if the network, the tokenizer or the training rows are not suitable for the task."""
        if network.router_loss_weight > 0 and not self.adds_router_loss:
            raise RecipeError(
                f"model: {network.model_type} is a mixture of experts with a router loss, which task {setup.name} does "
                "not add; without it few experts are used. Use another network, or set "
                "model.config.router_aux_loss_coef: 0"
            )
        self.setup, self.network, self.device = setup, network, device
        self.settings, self.tokenizer = setup.settings, setup.tokenizer

    @classmethod
    def config_settings(cls, setup: TaskSetup) -> dict[str, Any]:  # noqa: ARG003
        return {}

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None: ...

    @classmethod
    def frozen_roles(cls, setup: TaskSetup, section: ModelSection) -> dict[str, FrozenRole]:  # noqa: ARG003
        return {}

    @classmethod
    def check_setup(cls, setup: TaskSetup, frozen: Mapping[str, FrozenSource]) -> None: ...

    @classmethod
    def named_files(cls, setup: TaskSetup) -> dict[str, Path]:  # noqa: ARG003
        return {}

    @classmethod
    def start_column(cls, setup: TaskSetup, section: ModelSection) -> StartColumn | None:  # noqa: ARG003
        return None

    @classmethod
    def texts_of(cls, row: Row) -> Sequence[np.ndarray]:
        return [row.input_ids]

    def start_values(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def prepare_network(self, model: PreTrainedModel) -> None: ...

    def extend_network(self, model: Any, section: ModelSection) -> None: ...

    def prepare_frozen(self, role: str, model: PreTrainedModel, source: FrozenSource) -> None: ...

    def adopt(self, role: str, network: Any, facts: NetworkFacts) -> None:
        raise NotImplementedError

    def longest_rows(self, rows: Sequence[Row]) -> Sequence[Row]:
        return rows

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        raise NotImplementedError

    @property
    def needs_baseline(self) -> bool:
        return False

    def baseline(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        raise NotImplementedError

    def evaluate(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        return self.loss(model, inputs)

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

    def predict(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        predictions = self.evaluate(model, inputs).predictions
        assert predictions is not None
        return predictions

    def answer(self, predictions: Sequence[Any], rows: Sequence[Row]) -> Mapping[str, Any] | None:  # noqa: ARG002
        return None

    def judge(self, answer: Mapping[str, Any], rows: Sequence[Row]) -> Judged:
        raise NotImplementedError

    def target_ids(self, row: Row) -> np.ndarray | None:  # noqa: ARG002
        return None

    def before_targets(self, row: Row) -> np.ndarray:
        return row.input_ids[:0]

    def details(self, judged: Sequence[Judged]) -> dict[str, Any]:  # noqa: ARG002
        return {}
