"""3: a stateful loader repeats or loses batches with several ranks, especially at a second resume in one epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from in_process import NO_CONTEXT, make_dataset, make_recipe, make_store, make_task, ragged

from ptft_dist.training.batches import SupervisedBatches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_row_once_an_epoch_through_two_resumes(tmp_path: Path, ranks: int, workers: int) -> None:
    recipe = make_recipe(batch={"global_size": 6, "micro_size": 1}, train={"max_steps": None, "epochs": 1})
    store, task = make_store(tmp_path / "store", ragged(40)), make_task(recipe)
    seen: Counter[int] = Counter()
    for rank in range(ranks):
        dataset, plan = make_dataset(recipe, store, task, rank, ranks)
        assert plan.total_steps == 7  # the last of 4 rows
        state, done = {"step": 0}, 0
        for stop in (2, 5, 7):
            batches = SupervisedBatches(dataset, workers, pin_memory=False)
            batches.load_state_dict(state)
            while done < stop:
                for group in batches.next_phase(NO_CONTEXT):
                    for batch in group:
                        if batch.count:  # not the stand-in of a rank without rows
                            seen.update(batch.inputs["input_ids"][:, 0].tolist())
                done += 1
            state = batches.state_dict()  # workers have read further ahead than this
            assert state == {"step": stop}
    assert seen == Counter(range(40))
