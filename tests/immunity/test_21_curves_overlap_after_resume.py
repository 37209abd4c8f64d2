"""21: after a resume, the curves in TensorBoard and metrics.jsonl overlap with those of the lost updates."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import eval_rows, last_step, start, train_rows, write_recipe


@pytest.mark.parametrize("killed_at", [2, 7], ids=["before the first checkpoint", "after it"])
def test_each_update_has_one_point(tmp_path: Path, documents: Path, cache: Path, killed_at: int) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_recipe(tmp_path, documents, train={"max_steps": 10}, save={"every": 4}, eval={"every": 3, "at_start": True})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=["slow_updates:0.1", "prompt_tensorboard"])
    run.until(lambda: last_step(tmp_path / "run") >= killed_at, f"update {killed_at}")
    run.kill()
    events = list((tmp_path / "run/tensorboard").iterdir())
    lost = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert lost.Scalars("train/loss")[-1].step >= killed_at - 1  # points that the next start makes again

    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    curves = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == len(events) + 1
    points = curves.Scalars("train/loss")
    assert [point.step for point in points] == list(range(1, 11))
    logged = [row["loss"] for row in train_rows(tmp_path / "run")]
    assert [point.value for point in points] == pytest.approx(logged, rel=1e-6)
    assert [row["step"] for row in train_rows(tmp_path / "run")] == list(range(1, 11))
    assert [point.step for point in curves.Scalars("eval/loss")] == [0, 3, 6, 9, 10]
    assert [row["step"] for row in eval_rows(tmp_path / "run")] == [0, 3, 6, 9, 10]
