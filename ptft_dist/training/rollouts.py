"""Batches for tasks that learn from their own responses: a phase is a rollout, then epochs of updates on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ptft_dist.data.order import Plan
from ptft_dist.data.store import Row, Store
from ptft_dist.engine import Engine
from ptft_dist.reporting.messages import warn
from ptft_dist.rl.rollout import Phase, Rollout, Trajectory
from ptft_dist.tasks.protocol import Batch, Task
from ptft_dist.training.batches import PhaseContext, Shape, mask_all

if TYPE_CHECKING:
    from ptft_dist.training.report import UpdateReport


class RollingTask(Task, Protocol):
    """A task that makes rows from its own responses."""

    settings: Any

    def rollout(self, phase: Phase, store: Store, rows: Sequence[int]) -> Rollout: ...
    def as_row(self, each: Trajectory) -> Row: ...
    def phase_is_over(self, metrics: Mapping[str, float]) -> bool: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RolloutBatches:
    """Rollouts follow from the seed, the number of the phase and the weights, so a resume repeats them."""

    def __init__(self, task: RollingTask, store: Store, plan: Plan, shape: Shape, seed: int, global_size: int) -> None:
        """plan: the prompts of each phase. global_size: responses of one update, over all ranks."""
        self.task, self.store, self.plan, self.shape = task, store, plan, shape
        self.seed, self.global_size = seed, global_size
        self.phase, self.over, self.warned = 0, False, False
        self.metrics: dict[str, float] = {}
        self.samples: list[dict[str, Any]] = []
        settings = task.settings
        micro = settings.sampling.micro_size or 4 * (shape.micro_size or 16)
        self.sampling_shape = replace(shape, micro_size=micro, micro_tokens=None)

    def next_phase(self, context: PhaseContext) -> Iterator[Sequence[Batch]]:
        number, epochs = self.phase, self.task.settings.epochs
        self.phase, self.over = number + 1, False
        rollout = self.roll_out(context.engine, number)
        self._warn_of_endless(rollout)
        rows = [self.task.as_row(each) for each in rollout.trajectories]
        self.metrics, self.samples = rollout.metrics, [{"phase": number, **each} for each in rollout.samples]
        for epoch in range(epochs):
            order = np.random.default_rng([self.seed, number, epoch]).permutation(len(rows))
            for start in range(0, len(rows), self.global_size):
                if self.over:
                    return
                yield self.group([rows[i] for i in order[start : start + self.global_size]])

    def roll_out(self, engine: Engine, number: int) -> Rollout:
        phase = Phase(number, engine, self.shape.split, self.sampling_shape.split)
        return self.task.rollout(phase, self.store, self.plan.rows_of(number).tolist())

    def _warn_of_endless(self, rollout: Rollout) -> None:
        """Warn once of a policy that never ends a response: rewards then judge cut texts."""
        if self.warned or rollout.metrics.get("without_eos") != 1.0:
            return
        self.warned = True
        warn(
            f"none of the {len(rollout.trajectories)} responses ended within sampling.max_new_tokens: "
            f"{self.task.settings.sampling.max_new_tokens}. Raise it, or begin with a model that has learned to end "
            "its answers, for example by fine-tuning on conversations"
        )

    def group(self, rows: Sequence[Row]) -> list[Batch]:
        """This rank's micro-batches of one update."""
        batches = []
        for parts in self.shape.split(np.array([len(row.input_ids) for row in rows])):
            own = parts[self.shape.rank].tolist()
            batch = self.task.collate([rows[i] for i in own or [0]], [])
            batches.append(batch if own else Batch(mask_all(batch.inputs), 0, 0, tuple(0.0 for _ in batch.more_counts)))
        return batches

    def take_samples(self) -> list[dict[str, Any]]:
        taken, self.samples = self.samples, []
        return taken

    def observe(self, report: UpdateReport) -> None:
        self.over = self.over or self.task.phase_is_over(report.metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self.phase, "task": self.task.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.phase = int(state["phase"])
        self.task.load_state_dict(state["task"])
