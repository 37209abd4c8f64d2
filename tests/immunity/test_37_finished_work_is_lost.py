"""37: finished training, a checkpoint or a result is lost because of a later failure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import eval_rows, file_digest, outcome, rows, start, train_rows, write_recipe


def test_a_failing_last_evaluation_loses_nothing(tmp_path: Path, documents: Path, cache: Path) -> None:
    """With save.every: null the last save is the only one. It comes before the last evaluation."""
    write_recipe(tmp_path, documents, save={"every": None}, eval={"every": None})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=["fail_evaluation:8"])
    assert run.wait() == 1
    assert "this evaluation was made to fail" in run.stderr
    assert (tmp_path / "run/checkpoints/step-00000008/manifest.json").exists()
    assert not (tmp_path / "run/model").exists()
    again = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert again.wait() == 0, again.stderr
    assert "resumed from run/checkpoints/step-00000008, update 8 of 8" in again.stderr
    whole = start("train", "recipe.yaml", "run_dir=whole", cwd=tmp_path, cache=cache)
    assert whole.wait() == 0, whole.stderr
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_an_evaluation_that_cannot_work_fails_before_the_first_update(
    tmp_path: Path, documents: Path, cache: Path
) -> None:
    """Before training, one micro-batch is evaluated; nothing is written if that fails."""
    write_recipe(tmp_path, documents)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=["break_metrics"])
    assert run.wait() == 1
    assert "this metric was broken by a test" in run.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert not (tmp_path / "run/result.json").exists()


BEST: dict[str, Any] = {"save": {"every": None, "keep": 1, "best": True, "export": "best"}, "eval": {"every": 2}}


def test_a_best_save_that_fails_once_does_not_count(tmp_path: Path, documents: Path, cache: Path) -> None:
    """Update 4 is the best, but its save fails: the best checkpoint is that of update 2, and it is exported."""
    write_recipe(tmp_path, documents, **BEST)
    losses = "evaluations:2=3.0:4=1.0:6=4.0:8=5.0"
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=[losses, "fail_save:4"])
    assert run.wait() == 0, run.stderr
    assert "SAVE FAILED at update 4" in run.stderr
    saved = load_file(tmp_path / "run/checkpoints/step-00000002/model.safetensors")
    exported = load_file(tmp_path / "run/model/model.safetensors")
    assert all((exported[name] == saved[name]).all() for name in exported)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["metrics_step"], result["metrics"]["eval/loss"]) == (2, 3.0)
    assert result["best"] == {"metric": "loss", "value": 1.0, "step": 4}


def test_best_that_is_switched_on_at_a_resume_exports_the_last(tmp_path: Path, documents: Path, cache: Path) -> None:
    """All evaluations after the resume are worse than the best one, whose weights are in no checkpoint."""
    write_recipe(tmp_path, documents, save={"every": 4, "keep": None}, eval={"every": 2})
    losses = "evaluations:2=1.0:4=2.0:6=3.0:8=4.0"
    first = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=[losses, "die_in_rank:0:6"])
    first.wait()
    again = ["train", "recipe.yaml", "save.best=true", "save.export=best"]
    run = start(*again, cwd=tmp_path, cache=cache, patches=[losses])
    assert run.wait() == 0, run.stderr
    assert "warning: save.export: best: no checkpoint of this run has the best weights" in run.stderr
    last = load_file(tmp_path / "run/checkpoints/step-00000008/model.safetensors")
    assert all(
        (tensor == last[name]).all() for name, tensor in load_file(tmp_path / "run/model/model.safetensors").items()
    )


def test_a_damaged_best_checkpoint_is_named_and_the_last_weights_are_exported(
    tmp_path: Path, documents: Path, cache: Path
) -> None:
    """The metrics of result.json are those of the exported weights."""
    save = {"every": 4, "keep": None, "best": True, "export": "best"}
    write_recipe(tmp_path, documents, save=save, eval={"every": 2})
    losses = "evaluations:2=1.0:4=3.0:6=4.0:8=5.0"
    start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=[losses, "die_in_rank:0:7"]).wait()
    best = tmp_path / "run/checkpoints/step-00000002/model.safetensors"
    best.write_bytes(best.read_bytes()[:-4] + b"\1\2\3\4")
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=[losses])
    assert run.wait() == 0, run.stderr
    assert "was altered: its SHA-256 does not match the manifest. The last weights are exported instead" in run.stderr
    last = load_file(tmp_path / "run/checkpoints/step-00000008/model.safetensors")
    exported = load_file(tmp_path / "run/model/model.safetensors")
    assert all((tensor == last[name]).all() for name, tensor in exported.items())
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["metrics_step"], result["metrics"]["eval/loss"]) == (8, 5.0)


@pytest.mark.parametrize("changed", ["eval.goal=max", "eval.max_rows=3", "eval.metric=perplexity"])
def test_best_is_not_compared_across_metrics_goals_or_rows(
    tmp_path: Path, documents: Path, cache: Path, changed: str
) -> None:
    """After a resume with another metric, goal or rows, the earlier best evaluation does not count."""
    write_recipe(tmp_path, documents, eval={"every": 2}, save={"every": 4, "keep": None, "best": True})
    first = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=["die_in_rank:0:6"])
    first.wait()
    manifest = json.loads((tmp_path / "run/checkpoints/step-00000004/manifest.json").read_text())
    assert manifest["progress"]["evaluated_step"] == 4
    run = start("train", "recipe.yaml", changed, cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert "(loss " in run.stderr
    assert "no longer counts" in run.stderr
    assert [row["step"] for row in eval_rows(tmp_path / "run")] == [2, 4, 6, 8]
    best = json.loads((tmp_path / "run/result.json").read_text())["best"]
    scores = {row["step"]: row[f"eval/{best['metric']}"] for row in eval_rows(tmp_path / "run") if row["step"] > 2}
    choose = max if changed == "eval.goal=max" else min
    assert (best["step"], best["value"]) == choose(scores.items(), key=lambda pair: pair[1])


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["optim.lr=0.5"], 4),
        (["eval.metric=f1"], 2),
        (["--resume", "nowhere"], 4),
        (["data.train=[{path: nothing.txt}]"], 3),
    ],
    ids=["another recipe", "a wrong metric", "no checkpoint", "no data"],
)
def test_a_refused_command_changes_nothing_in_the_run_directory(
    tmp_path: Path, documents: Path, cache: Path, words: list[str], code: int
) -> None:
    write_recipe(tmp_path, documents)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    before = {path: file_digest(path) for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert any(path.name == "result.json" for path in before)
    refused = start("train", "recipe.yaml", *words, cwd=tmp_path, cache=cache)
    assert refused.wait() == code, refused.stderr
    assert {path: file_digest(path) for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_evaluations_at_the_step_of_a_save_are_made_again_and_stand_once(
    tmp_path: Path, documents: Path, cache: Path
) -> None:
    """Killed between the save and the evaluation of update 4, and again after that evaluation."""
    write_recipe(tmp_path, documents)
    for patch in ("fail_evaluation:4", "die_in_rank:0:5"):
        start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=[patch]).wait()
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    whole = start("train", "recipe.yaml", "run_dir=whole", cwd=tmp_path, cache=cache)
    assert whole.wait() == 0, whole.stderr
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert [row["step"] for row in eval_rows(tmp_path / "run")] == [4, 8]
    assert [row["step"] for row in train_rows(tmp_path / "run")] == list(range(1, 9))


def test_metrics_that_cannot_be_flushed_do_not_end_a_run(tmp_path: Path, documents: Path, cache: Path) -> None:
    """fsync of metrics.jsonl fails on a full disk; on two ranks, the other rank must not wait forever."""
    write_recipe(tmp_path, documents)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, patches=["full_disk_at_flush"])
    assert run.wait() == 0, run.stderr
    assert "metrics.jsonl: No space left on device; rows up to here may be lost" in run.stderr
    assert (tmp_path / "run/checkpoints/step-00000008/manifest.json").exists()


def test_the_result_of_an_earlier_start_goes_when_training_goes_on(
    tmp_path: Path, documents: Path, cache: Path
) -> None:
    """A run fails, is started again and is killed: result.json no longer reports the first failure."""
    write_recipe(tmp_path, documents)
    failed = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=["raise_in_rank:0:6"])
    assert failed.wait() == 1
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "failed"
    start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=["die_in_rank:0:7"]).wait()
    assert not (tmp_path / "run/result.json").exists()


def test_a_run_that_fails_keeps_the_points_of_tensorboard(tmp_path: Path, documents: Path, cache: Path) -> None:
    """TensorBoard writes in a thread of its own, and a failing rank of several exits without waiting for threads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_recipe(tmp_path, documents, save={"every": None}, eval={"every": None})
    patches = ["slow_tensorboard:0.05", "raise_in_rank:0:6"]
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, patches=patches)
    assert run.wait() == 1
    curves = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [point.step for point in curves.Scalars("train/loss")] == [1, 2, 3, 4, 5]
