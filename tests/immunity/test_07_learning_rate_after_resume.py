"""7: the learning rate is wrong after a resume, or the schedule is stepped once per process."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import last_step, start, train_rows, write_recipe

STEPS, WARMUP, PEAK, LOW = 10, 4, 0.01, 0.1


def by_hand(step: int) -> float:
    """Linear warmup to the peak in 4 updates, then linear decay to a tenth of it, reached at update 11."""
    if step <= WARMUP:
        return PEAK * step / WARMUP
    return PEAK * (LOW + (1 - LOW) * (1 - (step - 1 - WARMUP) / (STEPS - WARMUP)))


@pytest.mark.parametrize("kind", ["cpu", "cpu_zero2"])
def test_two_processes_killed_in_the_middle(tmp_path: Path, documents: Path, cache: Path, kind: str) -> None:
    optim = {"lr": PEAK, "warmup": WARMUP, "schedule": "linear", "min_lr_ratio": LOW}
    write_recipe(tmp_path, documents, optim=optim, train={"max_steps": STEPS}, save={"every": 3}, eval={"every": None})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, kind=kind, patches=["slow_updates:0.1"])
    run.until(lambda: last_step(tmp_path / "run") >= 5, "update 5")
    run.kill()
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, kind=kind)
    assert run.wait() == 0, run.stderr
    assert "resumed from" in run.stderr
    rates = [row["lr"] for row in train_rows(tmp_path / "run")]
    assert rates == pytest.approx([by_hand(step) for step in range(1, STEPS + 1)], rel=1e-12)
