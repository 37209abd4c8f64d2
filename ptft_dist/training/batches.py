"""Sources of micro-batches. A group is the list of micro-batches of one rank for one optimizer update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ptft_dist.data.order import Plan, split_update
from ptft_dist.data.store import Store
from ptft_dist.signals import ignore_stop_signals
from ptft_dist.tasks.protocol import BASELINE, Batch, Collate, Task

if TYPE_CHECKING:
    from ptft_dist.engine import Engine
    from ptft_dist.training.report import UpdateReport


@dataclass(frozen=True)
class PhaseContext:
    """What `Batches.next_phase` receives. step: the number of updates done so far."""

    step: int
    engine: Engine


class Batches(Protocol):
    """A stateful source of groups. Between phases its state is consistent with weights and optimizer.

    For supervised tasks a phase is one update. A phase of PPO is a rollout, then epochs x minibatches.
    """

    def next_phase(self, context: PhaseContext) -> Iterator[Sequence[Batch]]:
        """The groups of the next phase, one for each optimizer update."""

    @property
    def metrics(self) -> Mapping[str, float]:
        """What is logged with each update of the present phase."""

    def take_samples(self) -> list[dict[str, Any]]:
        """Texts of the present phase to show, once."""

    def observe(self, report: UpdateReport) -> None:
        """Called after each update with the same report on every rank, so that a phase can adapt or end early."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Shape:
    """How rows are distributed over data-parallel ranks and micro-batches."""

    rank: int
    world_size: int
    micro_size: int | None
    micro_tokens: int | None
    group_by_length: bool

    def split(self, lengths: np.ndarray) -> list[list[np.ndarray]]:
        return split_update(
            lengths,
            self.world_size,
            micro_size=self.micro_size,
            micro_tokens=self.micro_tokens,
            group_by_length=self.group_by_length,
        )


class UpdateDataset(Dataset):
    """Item k is the list of this rank's micro-batches for update k: a pure function of k, computed by any worker."""

    def __init__(self, store: Store, plan: Plan, shape: Shape, collate: Collate) -> None:
        self.store, self.plan, self.shape, self.collate = store, plan, shape, collate

    def __len__(self) -> int:
        return self.plan.total_steps

    def __getitem__(self, step: int) -> list[Batch]:
        rows, epochs = self.plan.rows_of(step), self.plan.epochs_of(step)
        keys = np.stack([epochs, rows], axis=1)
        parts = self.shape.split(self.store.lengths(rows))
        return [micro_batch(self.store, keys[part[self.shape.rank]], keys[0], self.collate) for part in parts]


def micro_batch(store: Store, keys: np.ndarray, spare: np.ndarray, collate: Collate) -> Batch:
    """Collate the rows of keys [N, 2]; each key is (epoch, row).

    A rank without rows gets a dummy batch: the `spare` row without any label. It must take part in every forward and
    backward pass, because the other ranks would wait for it.
    """
    taken = [(int(epoch), int(row)) for epoch, row in (keys if len(keys) else [spare])]
    batch = collate([store.row(row) for _, row in taken], taken)
    if len(keys):
        return replace(batch, rows=tuple(row for _, row in taken))
    return Batch(mask_all(batch.inputs), 0, 0, tuple(0.0 for _ in batch.more_counts))


def mask_all(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove all labels from a batch. Targets are the inputs whose names begin with `targets`: ids become -100 and
    numbers become NaN; every loss ignores both."""
    return {key: _no_target(x) if key.startswith("targets") else x for key, x in inputs.items()}


def _no_target(targets: torch.Tensor) -> torch.Tensor:
    return torch.full_like(targets, float("nan") if targets.is_floating_point() else -100)


def ignore_sigterm(_worker: int) -> None:
    """Ignore signals in data-loader workers: Slurm may signal every process of a job, but the rank ends its workers."""
    ignore_stop_signals()


class SupervisedBatches:
    """Batches for training on prepared rows; a phase is one update."""

    metrics: Mapping[str, float] = {}

    def __init__(self, dataset: UpdateDataset, workers: int, pin_memory: bool) -> None:
        self.dataset, self.workers, self.pin_memory = dataset, workers, pin_memory
        self.step = 0
        self._updates: Iterator[list[Batch]] | None = None

    def next_phase(self, context: PhaseContext) -> Iterator[Sequence[Batch]]:  # noqa: ARG002
        if self._updates is None:
            loader = DataLoader(
                self.dataset,
                batch_size=None,
                sampler=range(self.step, len(self.dataset)),
                num_workers=self.workers,
                prefetch_factor=2 if self.workers else None,
                pin_memory=self.pin_memory,
                worker_init_fn=ignore_sigterm,
                # Worker seeds come from this generator, so that the global one does not change.
                generator=torch.Generator(),
            )
            self._updates = iter(loader)
        group = next(self._updates)
        self.step += 1
        yield group

    def take_samples(self) -> list[dict[str, Any]]:
        return []

    def observe(self, report: UpdateReport) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self._updates = int(state["step"]), None


class BaselineBatches(SupervisedBatches):
    """A phase first measures, without gradients, a mean over all rows of its update, which the update's loss needs."""

    def __init__(self, dataset: UpdateDataset, workers: int, pin_memory: bool, task: Task) -> None:
        super().__init__(dataset, workers, pin_memory)
        self.task = task

    def next_phase(self, context: PhaseContext) -> Iterator[Sequence[Batch]]:
        for group in super().next_phase(context):
            yield with_baseline(context.engine, self.task, group)


def with_baseline(engine: Engine, task: Task, group: Sequence[Batch]) -> list[Batch]:
    """The micro-batches of an update, with the mean of `task.baseline` over all of them and all ranks as an input."""
    with engine.evaluating():
        parts = [engine.forward(task.baseline, batch.inputs) for batch in group]
    total, count = engine.all_sum(*torch.stack(parts).double().sum(0))
    mean = (total / count.clamp(min=1)).float()
    return [replace(batch, inputs={**batch.inputs, BASELINE: mean}) for batch in group]
