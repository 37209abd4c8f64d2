"""Starting a run: equal data on all ranks, the data report, requeued jobs, and stop requests before training."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from support import (
    file_digest,
    free_port,
    last_step,
    rank_variables,
    rows,
    start,
    train_rows,
    wait_until,
    write_documents,
    write_recipe,
)


def test_ranks_with_other_data_are_named_before_the_first_update(tmp_path: Path, cache: Path) -> None:
    """Two machines with separate caches train different wordpiece tokenizers and read other files."""
    for name, count in (("a", 160), ("b", 150)):
        (tmp_path / name).mkdir()
        write_documents(tmp_path / name / "text.txt", count)
    tokenizer = {"train": {"vocab_size": 320, "algorithm": "wordpiece"}}
    write_recipe(tmp_path, Path("HERE/text.txt"), tokenizer=tokenizer, train={"max_steps": None, "epochs": 1})
    recipe = (tmp_path / "recipe.yaml").read_text()
    for name in ("a", "b"):
        (tmp_path / name / "recipe.yaml").write_text(recipe.replace("HERE/", ""))
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, patches=["a_folder_for_each_rank:a:b"])
    assert run.wait() == 3, run.stderr
    assert "data: rank 1 and rank 0 do not have the same data; different: " in run.stderr
    for what in ("tokenizer", "training rows", "updates"):
        assert what in run.stderr
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_ranks_with_another_recipe_are_named(tmp_path: Path, cache: Path) -> None:
    """Two machines with the same data and two versions of the recipe."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_documents(tmp_path / name / "text.txt")
    write_recipe(tmp_path, Path("text.txt"))
    recipe = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "a/recipe.yaml").write_text(recipe)
    (tmp_path / "b/recipe.yaml").write_text(recipe.replace('"lr": 0.01', '"lr": 0.02'))
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, patches=["a_folder_for_each_rank:a:b"])
    assert run.wait() == 3, run.stderr
    assert "rank 1 and rank 0 do not have the same data; different: recipe." in run.stderr


def test_a_resume_with_another_cache_uses_the_tokenizer_of_the_run(tmp_path: Path, documents: Path) -> None:
    """wordpiece trains a different tokenizer each time, so the one in the run directory is used."""
    write_recipe(tmp_path, documents, tokenizer={"train": {"vocab_size": 320, "algorithm": "wordpiece"}})
    first = start("train", "recipe.yaml", "train.max_steps=8", cwd=tmp_path, cache=tmp_path / "one")
    assert first.wait() == 0, first.stderr
    kept = {path.name: file_digest(path) for path in (tmp_path / "run/tokenizer").iterdir()}
    assert "tokenizer.json" in kept
    (tmp_path / "run/checkpoints/step-00000008").rename(tmp_path / "lost")
    again = start("train", "recipe.yaml", "train.max_steps=8", cwd=tmp_path, cache=tmp_path / "two")
    assert again.wait() == 0, again.stderr
    assert "resumed from run/checkpoints/step-00000004" in again.stderr
    assert [row["step"] for row in train_rows(tmp_path / "run")] == list(range(1, 9))
    assert {path.name: file_digest(path) for path in (tmp_path / "run/tokenizer").iterdir()} == kept
    assert json.loads((tmp_path / "run/model/tokenizer.json").read_text()) == json.loads(
        (tmp_path / "run/tokenizer/tokenizer.json").read_text()
    )


def test_what_was_dropped_is_reported_at_every_start(tmp_path: Path, cache: Path) -> None:
    """Also under an unmodified launcher and with cached data; data_report.json contains it too."""
    (tmp_path / "text.txt").write_text("\n".join(["a b c d e f g h"] * 60 + [""] * 7) + "\n")
    write_recipe(tmp_path, tmp_path / "text.txt", data={"validation": None}, eval={"every": None})
    for attempt in range(2):
        run = start("train", "recipe.yaml", f"run_dir=run{attempt}", cwd=tmp_path, cache=cache, ranks=2)
        assert run.wait() == 0, run.stderr
        assert run.stderr.count("dropped 7 of 67 documents without text") == 1, run.stderr
        report = json.loads((tmp_path / f"run{attempt}/data_report.json").read_text())
        assert (report["read"], report["train"]["examples"]) == (67, 60)
        assert [count for count, _ in report["dropped"].values()] == [7]
    assert "loaded from the cache" in run.stderr


@pytest.mark.parametrize(
    ("how", "every", "own"),
    [("never", 4, "step-00000004"), ("PATH", 4, None), ("PATH", 2, "step-00000006")],
    ids=["never", "PATH", "PATH, and a checkpoint since"],
)
def test_resume_never_and_a_path_belong_to_the_first_start_of_a_job(
    tmp_path: Path, documents: Path, cache: Path, how: str, every: int, own: str | None
) -> None:
    """A requeued job repeats its command line, but resumes from its own checkpoints."""
    write_recipe(tmp_path, documents, eval={"every": None})
    other = start("train", "recipe.yaml", "run_dir=other", cwd=tmp_path, cache=cache)
    assert other.wait() == 0, other.stderr
    if how == "PATH":
        how = "other/checkpoints/step-00000004"
    words = ["train", "recipe.yaml", f"save.every={every}", "--resume", how]
    job = {"SLURM_JOB_ID": "123", "SLURM_RESTART_COUNT": "0"}
    first = start(*words, cwd=tmp_path, cache=cache, env=job, patches=["die_in_rank:0:8"])
    first.wait()
    assert last_step(tmp_path / "run") == 7
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert saved[-1:] == ([own] if own else [])
    again = start(*words, cwd=tmp_path, cache=cache, env=job | {"SLURM_RESTART_COUNT": "1"})
    assert again.wait() == 0, again.stderr
    # Without a checkpoint of its own, the run begins at the path again.
    assert f"resumed from {f'run/checkpoints/{own}' if own else how}," in again.stderr
    new_job = start(*words, cwd=tmp_path, cache=cache, env={"SLURM_JOB_ID": "124", "SLURM_RESTART_COUNT": "1"})
    assert new_job.wait() == 0, new_job.stderr
    assert ("resumed from" in new_job.stderr) is (how != "never")
    assert how == "never" or f"resumed from {how}," in new_job.stderr


def test_a_run_that_starts_from_another_one_s_checkpoint_saves_its_own(
    tmp_path: Path, documents: Path, cache: Path
) -> None:
    """Even if it stops before its first update, so that the command that is shown continues it."""
    write_recipe(tmp_path, documents, eval={"every": None}, log={"report": True})
    other = start("train", "recipe.yaml", "run_dir=other", "log.report=false", cwd=tmp_path, cache=cache)
    assert other.wait() == 0, other.stderr
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stop").touch()
    stopped = start("train", "recipe.yaml", "--resume", "other/checkpoints/step-00000004", cwd=tmp_path, cache=cache)
    assert stopped.wait() == 75, stopped.stderr
    assert "saved to run/checkpoints/step-00000004; continue with: ptft train recipe.yaml\n" in stopped.stderr
    assert "warning" not in stopped.stderr  # there is nothing to report yet
    again = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert again.wait() == 0, again.stderr
    assert "resumed from run/checkpoints/step-00000004," in again.stderr


def test_a_start_from_zero_trains_its_own_tokenizer(tmp_path: Path, documents: Path, cache: Path) -> None:
    """Not that of the checkpoints beside it, which may have met other texts."""
    write_recipe(tmp_path, documents, train={"max_steps": 2})
    words = ("train", "recipe.yaml")
    first = start(*words, cwd=tmp_path, cache=cache)
    assert first.wait() == 0, first.stderr
    (tmp_path / "other.txt").write_text("\n".join(f"zebra {i} quagga" for i in range(80)))
    change = ('data.train=[{"path": "other.txt", "document": "line"}]', "--resume", "never")
    for run_dir in ("run", "fresh"):
        done = start(*words, f"run_dir={run_dir}", *change, cwd=tmp_path, cache=cache)
        assert done.wait() == 0, done.stderr
    own, fresh = (tmp_path / name / "tokenizer/tokenizer.json" for name in ("run", "fresh"))
    assert own.read_bytes() == fresh.read_bytes()


@pytest.mark.parametrize(
    ("number", "job", "code"), [("SIGTERM", {}, 143), ("SIGINT", {}, 130), ("SIGTERM", {"SLURM_JOB_ID": "1"}, 75)]
)
def test_a_signal_while_data_are_prepared_ends_at_once(
    tmp_path: Path, documents: Path, number: str, job: dict[str, str], code: int
) -> None:
    """Also in C code; with exit code 75 if the job is requeued."""
    write_recipe(tmp_path, documents)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=tmp_path / "cache", patches=["slow_prepare:60"], env=job)
    run.until((tmp_path / "preparing").exists, "prepare")
    asked = time.monotonic()
    os.kill(run.processes[0].pid or 0, getattr(signal, number))
    assert run.wait(20) == code, run.stderr
    assert time.monotonic() - asked < 10
    assert f"stopped by {number}" in run.stderr
    again = start("train", "recipe.yaml", cwd=tmp_path, cache=tmp_path / "cache")
    assert again.wait() == 0, again.stderr


def test_a_signal_while_ranks_wait_for_each_other_ends_at_once(tmp_path: Path, documents: Path, cache: Path) -> None:
    """One of two ranks does not start; the other waits for it in C++ and gets SIGTERM."""
    write_recipe(tmp_path, documents)
    warm = start("prepare", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert warm.wait() == 0, warm.stderr
    alone = rank_variables(0, 2, port=free_port(), kind="cpu")
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, env=alone)
    errors = Path(f"{run.output}-0.err")
    wait_until(lambda: errors.exists() and "vocabulary" in errors.read_text(), "the report of the data")
    time.sleep(2)
    os.kill(run.processes[0].pid or 0, signal.SIGTERM)
    assert run.wait(20) == 143, run.stderr


def test_a_stop_during_an_evaluation_is_noticed_in_it(tmp_path: Path, documents: Path, cache: Path) -> None:
    """The checkpoint of that update was saved before; the evaluation is repeated at the resume."""
    write_recipe(tmp_path, documents, data={"validation": 0.3}, eval={"micro_size": 1})
    patch = ["slow_micro_batches_of_evaluations:0.2"]
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, patches=patch)
    run.until((tmp_path / "evaluating").exists, "the evaluation")
    os.kill(run.processes[1].pid or 0, signal.SIGTERM)
    asked = time.monotonic()
    assert run.wait(60) == 75, run.stderr
    assert time.monotonic() - asked < 15
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["status"], result["steps"]) == ("stopped", 4)
    assert (tmp_path / "run/checkpoints/step-00000004/manifest.json").exists()
    assert [row for row in rows(tmp_path / "run") if "eval/loss" in row] == []
    again = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2)
    assert again.wait() == 0, again.stderr
    whole = start("train", "recipe.yaml", "run_dir=whole", cwd=tmp_path, cache=cache, ranks=2)
    assert whole.wait() == 0, whole.stderr
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def test_a_due_evaluation_does_not_delay_a_stop(tmp_path: Path, documents: Path, cache: Path) -> None:
    """A stop request in the update before a due evaluation: the run saves and ends."""
    write_recipe(tmp_path, documents, eval={"every": 1}, save={"every": None})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=["sigterm_in_update:2"])
    assert run.wait(60) == 75, run.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["steps"] == 2
    assert [row["step"] for row in rows(tmp_path / "run") if "eval/loss" in row] == [1]
    assert "stopped by SIGTERM after update 2; saved" in run.stderr
