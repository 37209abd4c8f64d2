"""4: resuming late in an epoch takes hours of skipping. Here it must take under a second for any size."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from in_process import NO_CONTEXT, make_recipe, make_task

from ptft_dist.data.order import make_plan
from ptft_dist.data.store import Row
from ptft_dist.training.batches import Shape, SupervisedBatches, UpdateDataset

ROWS = 2_000_000_000


class HugeStore:
    """A store whose rows are created when they are read."""

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        return 2 + indices % 30

    def row(self, i: int) -> Row:
        return Row(np.full(2 + i % 30, i % 40), np.zeros(1, np.int64))


def test_at_ninety_percent_of_two_billion_rows() -> None:
    store: Any = HugeStore()
    started = time.perf_counter()
    plan = make_plan(ROWS, store.lengths, 0, global_size=512, epochs=1)
    dataset = UpdateDataset(store, plan, Shape(1, 4, 16, None, True), make_task(make_recipe()).collate)
    batches = SupervisedBatches(dataset, workers=0, pin_memory=False)
    batches.load_state_dict({"step": plan.total_steps * 9 // 10})
    (group,) = batches.next_phase(NO_CONTEXT)
    assert time.perf_counter() - started < 1
    assert plan.total_steps == 3_906_250
    assert len(group) == 8
