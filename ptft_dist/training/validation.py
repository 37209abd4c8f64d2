"""One pass over the validation rows: every row counted exactly once, over any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ptft_dist.data.store import Store
from ptft_dist.engine import Engine
from ptft_dist.reporting.metrics import Averages
from ptft_dist.tasks.protocol import EVALUATION_EPOCH, Batch, Collate, Task
from ptft_dist.training.batches import Shape, micro_batch


class Validation:
    """This rank's share of the validation rows, in as many micro-batches as every other rank has."""

    def __init__(self, store: Store, shape: Shape, collate: Collate, max_rows: int | None) -> None:
        self.store, self.shape, self.collate = store, shape, collate
        rows = np.arange(min(len(store), max_rows or len(store)))
        self.parts = shape.split(store.lengths(rows))
        self.keys = np.stack([np.full_like(rows, EVALUATION_EPOCH), rows], axis=1)

    def batches(self) -> Iterator[Batch]:
        for part in self.parts:
            yield micro_batch(self.store, self.keys[part[self.shape.rank]], self.keys[0], self.collate)

    def score(self, engine: Engine, task: Task) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """The task's metrics, `loss` among them, and samples of what it predicts; the same on every rank.

        Averages come from sums over ranks; scores that are no averages (F1, correlations, BLEU) from all predictions,
        brought together on rank 0.
        """
        averages, counts = Averages(), np.zeros(1)
        predictions: list[tuple[int, Any]] = []
        with engine.evaluating():
            for batch in self.batches():
                loss_sum, metrics, output = engine.forward(task.evaluate, batch.inputs)
                averages.add(loss_sum, metrics)
                counts = counts + np.array(batch.counts)
                if output is not None:
                    predictions += zip(batch.rows, task.predictions(output), strict=False)
        numbers = engine.all_sum(*averages.sums(), *map(float, counts)).tolist()
        loss, others = averages.read(numbers[: -len(counts)], numbers[-len(counts) :])
        scores: tuple[dict[str, float], list[dict[str, Any]]] = ({}, [])
        gathered = engine.gather_on_main(predictions)
        if engine.is_main:
            found = {row: prediction for part in gathered for row, prediction in part}
            scores = task.scores({row: found[row] for row in sorted(found)}, self.store.row)
        metrics, samples = engine.gather_objects(scores)[0]
        return {**task.eval_metrics({"loss": loss, **others}), **metrics}, samples
