"""P1 and P2 for every task: losses and scores do not depend on the split, and a killed run resumes exactly."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support import eval_rows, outcome, start, train_rows
from tiny import ROLLING, TINY, write_tiny

from ptft_dist.tasks.registry import TASKS

# Two updates before the checkpoint and two after it. ZeRO-3 costs a millisecond for each module and micro-batch.
SHORT: dict[str, Any] = {
    "layers": 1,
    "train": {"max_steps": 4},
    "eval": {"every": 2, "micro_size": 6},
    "save": {"every": 2},
}
RUNS = {"ddp": (2, "cpu"), "zero2": (2, "cpu_zero2"), "zero3": (2, "cpu_zero3")}
RUNS |= {"fsdp2": (2, "fsdp2"), "fsdp2_efficient": (2, "fsdp2_efficient")}
CASES = [(task, name) for task in TINY for name in ("ddp", "zero2", "zero3")]
# Networks that FSDP2 shards otherwise: what is tied to the embedding or the head has several owners.
CASES += [(task, name) for task in ("mlm_nsp", "seq2seq") for name in ("fsdp2", "fsdp2_efficient")]


def short(task: str) -> dict[str, Any]:
    """Changes of the tiny recipe; the updates from one set of responses end with a checkpoint."""
    if task == "regression":  # predictions that hardly differ have a correlation of rounding errors
        return {**SHORT, "model": {"config": {"initializer_range": 0.2}}}
    return {**SHORT, task: {"epochs": 2}} if task in ROLLING else SHORT


def test_every_task_is_here() -> None:
    trained = {name for name, spec in TASKS.items() if spec.settings.trains}
    assert set(TINY) == trained - {"clm", "mlm"}  # which have their own tests of the promises


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Any:
    """The directory of each task's run by one process, which is started once."""
    folders: dict[str, Path] = {}

    def provide(task: str) -> Path:
        if task not in folders:
            folder = tmp_path_factory.mktemp(task)
            write_tiny(folder, task, **short(task))
            run = start("train", "recipe.yaml", "run_dir=whole", cwd=folder, cache=cache)
            assert run.wait() == 0, run.stderr
            folders[task] = folder
        return folders[task]

    return provide


@pytest.mark.parametrize(("task", "name"), CASES)
def test_any_split_has_the_same_losses_and_scores(whole: Any, cache: Path, task: str, name: str) -> None:
    folder, (ranks, kind) = whole(task), RUNS[name]
    run = start("train", "recipe.yaml", f"run_dir={name}", cwd=folder, cache=cache, ranks=ranks, kind=kind)
    assert run.wait() == 0, run.stderr
    ours, theirs = train_rows(folder / name), train_rows(folder / "whole")
    assert len(ours) == len(theirs) == 4
    for row, expected in zip(ours, theirs, strict=True):
        near_zero = 1e-7 if task in ROLLING else 0.0  # the loss of a policy has either sign
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=near_zero), row
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), row
        assert row["tokens"] == expected["tokens"]
    evaluations = [eval_rows(folder / each) for each in (name, "whole")]
    assert [[row["step"] for row in each] for each in evaluations] == [[2, 4], [2, 4]]
    for row, expected in zip(*evaluations, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("task", TINY)
def test_killed_and_resumed_is_never_killed(tmp_path: Path, cache: Path, task: str) -> None:
    """With dropout, on two ranks: a run whose last checkpoint is lost ends with the same bits and the same log."""
    write_tiny(tmp_path, task, dropout=0.1, **short(task))
    first = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2)
    assert first.wait() == 0, first.stderr
    expected = outcome(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000004")
    shutil.rmtree(tmp_path / "run/model")
    again = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2)
    assert again.wait() == 0, again.stderr
    assert "resumed from" in again.stderr
    assert outcome(tmp_path / "run") == expected
