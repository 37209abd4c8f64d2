"""12: accumulation changes the loss, because each micro-batch is averaged alone; also in a short last update.

Across ranks: distributed/test_split.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from in_process import NO_CONTEXT, make_recipe, make_store, make_trainer

# Updates of 6 rows: very unequal ones, and at the end an update of one row.
LENGTHS = [32, 2, 2, 3, 30, 2, 2, 25, 2, 31, 2, 2, 9]
SPLITS: list[dict[str, Any]] = [
    {"micro_size": 6},
    {"micro_size": 1},
    {"micro_size": 2, "group_by_length": False},
    {"micro_size": 3},
    {"micro_size": None, "micro_tokens": 40},
]


@pytest.mark.parametrize("batch", SPLITS, ids=str)
def test_loss_and_gradient_are_means_over_all_tokens_of_the_update(tmp_path: Path, batch: dict[str, Any]) -> None:
    recipe = make_recipe(batch=batch, train={"max_steps": None, "epochs": 1}, optim={"max_grad_norm": None})
    store = make_store(tmp_path / "store", LENGTHS)
    with make_trainer(tmp_path, store, recipe) as (trainer, kept):
        model = trainer.engine.model
        dataset = trainer.batches.dataset  # type: ignore[attr-defined]
        assert [len(dataset.plan.rows_of(step)) for step in range(3)] == [6, 6, 1]
        expected = []
        for step in range(3):
            rows = [torch.from_numpy(store.row(int(i)).input_ids) for i in dataset.plan.rows_of(step)]
            tokens = sum(len(row) - 1 for row in rows)
            model.zero_grad()
            losses = [F.cross_entropy(model(row[None, :-1]).logits[0], row[1:], reduction="sum") for row in rows]
            loss = torch.stack(losses).sum() / tokens
            loss.backward()
            squares = [float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None]
            model.zero_grad()
            expected.append((loss.item(), math.sqrt(sum(squares)), tokens))
            (group,) = trainer.batches.next_phase(NO_CONTEXT)
            trainer.log(trainer.train_row(trainer.update(group), 1.0))
            trainer.progress.step += 1
    assert [row["loss"] for row in kept.rows] == pytest.approx([loss for loss, _, _ in expected], rel=1e-5)
    assert [row["grad_norm"] for row in kept.rows] == pytest.approx([norm for _, norm, _ in expected], rel=1e-4)
    assert [row["loss_tokens"] for row in kept.rows] == [tokens for _, _, tokens in expected]
