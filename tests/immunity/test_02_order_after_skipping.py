"""2: after a resume, the samples come in another order than without it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from in_process import NO_CONTEXT, make_dataset, make_recipe, make_store, make_task, ragged

from ptft_dist.training.batches import SupervisedBatches


@pytest.mark.parametrize("workers", [0, 2])
def test_from_any_update_on_the_rest_is_the_same(tmp_path: Path, workers: int) -> None:
    """Three epochs of 32 rows in updates of 6, so that epochs begin within updates."""
    recipe = make_recipe(train={"max_steps": None, "epochs": 3})
    dataset, plan = make_dataset(recipe, make_store(tmp_path / "store", ragged(32)), make_task(recipe))
    assert plan.total_steps == 16

    def rest(step: int) -> list[torch.Tensor]:
        batches = SupervisedBatches(dataset, workers, pin_memory=False)
        batches.load_state_dict({"step": step})
        groups = [group for _ in range(step, 16) for group in batches.next_phase(NO_CONTEXT)]
        assert batches.state_dict() == {"step": 16}
        return [batch.inputs["input_ids"] for group in groups for batch in group]

    whole = rest(0)
    assert len(whole) == 16 * 2
    for step in range(1, 16) if workers == 0 else (1, 11):
        resumed = rest(step)
        assert len(resumed) == (16 - step) * 2
        assert all(torch.equal(a, b) for a, b in zip(resumed, whole[2 * step :], strict=True))
