"""06: rows are not shuffled, or come in the same order in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from in_process import NO_CONTEXT

from ptft_dist.data.order import make_plan
from ptft_dist.data.store import Row, StoreWriter, TokenStore
from ptft_dist.tasks.protocol import Batch
from ptft_dist.training.batches import Shape, SupervisedBatches, UpdateDataset

ROWS, EPOCHS = 60, 3


def store(path: Path, packing: bool) -> TokenStore:
    """Row i contains only the token i."""
    writer = StoreWriter(path, vocab_size=ROWS, max_length=4, packing=packing)
    for i in range(ROWS):
        writer.add([i] * 4)
    writer.close()
    return TokenStore.open(path)


def collate(rows: Sequence[Row], _keys: Sequence[tuple[int, int]]) -> Batch:
    ids = torch.tensor([row.input_ids.tolist() for row in rows])
    return Batch({"input_ids": ids}, count=ids.numel(), tokens=ids.numel())


def epochs(
    path: Path, *, packing: bool = False, seed: int = 0, workers: int = 0, micro_size: int = 2
) -> list[list[int]]:
    """The rows in the order of the trainer, epoch by epoch."""
    rows = store(path, packing)
    plan = make_plan(len(rows), rows.lengths, seed, global_size=6, epochs=EPOCHS)
    shape = Shape(0, 1, micro_size, None, group_by_length=True)
    batches = SupervisedBatches(UpdateDataset(rows, plan, shape, collate), workers, pin_memory=False)
    stream = [
        int(row[0])
        for _ in range(plan.total_steps)
        for group in batches.next_phase(NO_CONTEXT)
        for batch in group
        for row in batch.inputs["input_ids"]
    ]
    return [stream[i : i + ROWS] for i in range(0, len(stream), ROWS)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("packing", [False, True])
def test_every_epoch_is_whole_and_shuffled_anew(tmp_path: Path, packing: bool, workers: int) -> None:
    seen = epochs(tmp_path / "store", packing=packing, workers=workers)
    assert len(seen) == EPOCHS
    assert all(sorted(epoch) == list(range(ROWS)) for epoch in seen)
    for order in [list(range(ROWS)), *seen]:
        same_place = [sum(a == b for a, b in zip(order, epoch, strict=True)) for epoch in seen if epoch is not order]
        assert max(same_place) < 8  # one on average between two random orders of any length


def test_the_seed_decides_and_the_split_does_not(tmp_path: Path) -> None:
    first = epochs(tmp_path / "a")
    assert epochs(tmp_path / "b") == first
    assert epochs(tmp_path / "c", micro_size=3) == first
    assert epochs(tmp_path / "d", seed=1) != first
