"""The tasks. One module each, one line each in TASKS; a module holds all that is special to its task."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from ptft_dist.batches import Batch
from ptft_dist.data.store import Row

TASKS = {
    "clm": "ptft_dist.tasks.clm:CausalLM",
    "mlm": "ptft_dist.tasks.mlm:MaskedLM",
}
IGNORE = -100  # a target that counts nothing


class LossOut(NamedTuple):
    """loss_sum: the loss summed, not averaged, over what Batch.count counts; metrics: name -> (total, count)."""

    loss_sum: torch.Tensor
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]


class Task(Protocol):
    """What is special to a task. It owns no optimizer and no loop."""

    metric_names: Sequence[str]
    """What eval_metrics returns: the choice for eval.metric."""

    auto_class: Any
    """The transformers class that builds the network."""

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """keys: (epoch, row) of each row; whatever is drawn at random is a function of it and the seed."""

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut: ...
    def install(self, model: PreTrainedModel) -> None: ...
    def probe(self) -> Probe | None: ...
    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]: ...


class Probe(Protocol):
    """A question put to the network before training, on made-up input; `check` raises RecipeError at a bad answer."""

    inputs: dict[str, torch.Tensor]

    def outputs(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor: ...
    def check(self, outputs: torch.Tensor) -> None: ...


def task_class(name: str) -> Any:
    """The class that TASKS names; made with (recipe, tokenizer, device), it is a Task."""
    module, attribute = TASKS[name].split(":")
    return getattr(import_module(module), attribute)
