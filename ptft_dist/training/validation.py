"""Evaluation on the validation rows. Every row counts exactly once, with any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from ptft_dist.data.store import Store
from ptft_dist.engine import Engine
from ptft_dist.errors import NonFiniteLossError, RecipeError
from ptft_dist.reporting.messages import progress
from ptft_dist.tasks.protocol import EVALUATION_EPOCH, Batch, Collate, LossOut, Task
from ptft_dist.training.averages import Averages
from ptft_dist.training.batches import Shape, micro_batch

STOP_EVERY = 8
"""Micro-batches between two checks for a stop request; each check is a collective sum."""

Scores = tuple[dict[str, float], list[dict[str, Any]]]
"""Metrics (including `loss`) and samples of predictions."""


@dataclass(frozen=True)
class PartResult:
    """The result of one micro-batch of one rank."""

    loss_sum: torch.Tensor
    metrics: dict[str, tuple[torch.Tensor, torch.Tensor]]
    counts: tuple[float, ...]
    rows: tuple[int, ...]
    predictions: Sequence[Any]
    """One for each row; empty if the task predicts nothing."""
    row_losses: torch.Tensor | None

    @classmethod
    def of(cls, batch: Batch, out: LossOut, task: Task) -> PartResult:
        predictions = [] if out.predictions is None else task.predictions(out.predictions)[: len(batch.rows)]
        return cls(out.loss_sum, out.metrics, batch.counts, batch.rows, predictions, out.row_losses)


class Keeper(Protocol):
    """Keeps the results of this rank's micro-batches, those of an earlier, interrupted evaluation included."""

    def restored(self, engine: Engine) -> Sequence[PartResult]:
        """The results of the first micro-batches, the same number on every rank."""

    def keep(self, result: PartResult) -> None: ...


@dataclass
class Validation:
    """This rank's share of the validation rows. All ranks have the same number of micro-batches."""

    store: Store
    shape: Shape
    collate: Collate
    max_rows: int | None
    data: str
    """Identifies the prepared validation data."""

    def __post_init__(self) -> None:
        rows = np.arange(min(len(self.store), self.max_rows or len(self.store)))
        self.identity = f"{self.data}, {len(rows)} rows"
        self.parts = self.shape.split(self.store.lengths(rows))
        self.keys = np.stack([np.full_like(rows, EVALUATION_EPOCH), rows], axis=1)

    def batches(self, parts: Sequence[list[np.ndarray]] | None = None) -> Iterator[Batch]:
        for part in self.parts if parts is None else parts:
            yield micro_batch(self.store, self.keys[part[self.shape.rank]], self.keys[0], self.collate)

    def score(
        self,
        engine: Engine,
        task: Task,
        stop: Callable[[], bool] = lambda: False,
        keeper: Keeper | None = None,
    ) -> Scores | None:
        """Evaluate all rows. The result is the same on every rank; None if a rank was asked to stop before the end.

        Averages are computed from sums over ranks. Other metrics (F1, correlations, BLEU) are computed from all
        predictions, gathered on rank 0.
        """
        return self._score(engine, task, self.parts, stop, keeper)

    def rehearse(self, engine: Engine, task: Task, metric: str) -> None:
        """Evaluate the smallest micro-batch, generation included. Raises RecipeError if the task has no such metric."""
        scores = self._score(engine, task, self.parts[-1:], lambda: False)
        assert scores is not None
        metrics, _ = scores
        if metric not in metrics:
            raise RecipeError(
                f"eval.metric: {metric!r} is not a metric of this task; choose one of: {', '.join(metrics)}"
            )

    def _score(
        self,
        engine: Engine,
        task: Task,
        parts: Sequence[list[np.ndarray]],
        stop: Callable[[], bool],
        keeper: Keeper | None = None,
    ) -> Scores | None:
        averages, counts = Averages(), np.zeros(1)
        predictions: list[tuple[int, Any]] = []

        def add(result: PartResult) -> None:
            nonlocal counts
            averages.add(result.loss_sum, result.metrics)
            counts = counts + np.array(result.counts)
            predictions.extend(zip(result.rows, result.predictions, strict=False))
            shown.advance()

        with engine.evaluating(), progress("evaluating", len(parts), "micro-batches") as shown:
            restored = [] if keeper is None else keeper.restored(engine)
            for result in restored:
                add(result)
            for i, batch in enumerate(self.batches(parts[len(restored) :]), len(restored)):
                if i % STOP_EVERY == STOP_EVERY - 1 and engine.all_sum(float(stop())).item() > 0:
                    return None
                result = PartResult.of(batch, LossOut(*engine.forward(task.evaluate, batch.inputs)), task)
                add(result)
                if keeper is not None:
                    keeper.keep(result)
        numbers = engine.all_sum(*averages.sums(), *map(float, counts)).tolist()
        loss, others = averages.read(numbers[: -len(counts)], numbers[-len(counts) :])
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the validation loss is {loss}. If the training losses are finite, rows of data.validation overflow: "
                "check their labels and lengths, and start again; data.validation and eval may change at a resume. "
                "Otherwise resume from an earlier checkpoint with --resume PATH and a lower optim.lr"
            )
        scores: Scores = ({}, [])
        gathered = engine.gather_on_main(predictions)
        if engine.is_main:
            by_row = {row: prediction for part in gathered for row, prediction in part}
            scores = task.scores({row: by_row[row] for row in sorted(by_row)}, self.store.row)
        metrics, samples = engine.gather_objects(scores)[0]
        return {**task.eval_metrics({"loss": loss, **others}), **metrics}, samples
