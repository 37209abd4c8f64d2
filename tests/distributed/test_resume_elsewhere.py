"""Resuming on another number of processes or with another recipe: the same samples follow, or a clear refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import last_step, outcome, start, train_rows, write_recipe

STEPS = 12


def prepare_folder(folder: Path, documents: Path, micro_size: int = 2, **changes: Any) -> None:
    recipe: dict[str, Any] = {
        "batch": {"global_size": 12, "micro_size": micro_size},
        "train": {"max_steps": STEPS},
        "save": {"every": 4},
        "eval": {"every": None},
    }
    write_recipe(folder, documents, **recipe | changes)


def rows_by_step(folder: Path) -> dict[int, list[int]]:
    """The sorted rows of each update over all ranks, from the last start that made this update."""
    by_rank: dict[int, dict[str, list[int]]] = {}
    for file in folder.glob("rows-*.jsonl"):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            by_rank.setdefault(record["step"], {})[file.name] = record["rows"]
    return {step: sorted(row for rows in ranks.values() for row in rows) for step, ranks in by_rank.items()}


def test_one_two_one_processes_go_through_the_same_samples(tmp_path: Path, documents: Path, cache: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        prepare_folder(folder, documents)
    run = start("train", "recipe.yaml", cwd=whole, cache=cache, patches=["record_rows"])
    assert run.wait() == 0, run.stderr

    expected = rows_by_step(whole)
    assert list(expected) == list(range(1, STEPS + 1))
    joined: dict[int, list[int]] = {}
    for ranks, first, last in ((1, 1, 6), (2, 5, 9), (1, 9, STEPS)):
        patches = ["record_rows", "slow_updates:0.1"]
        run = start("train", "recipe.yaml", cwd=parts, cache=cache, ranks=ranks, patches=patches)
        if last == STEPS:
            assert run.wait() == 0, run.stderr
        else:
            run.until(lambda last=last: last_step(parts / "run") >= last, f"update {last}")
            run.kill()
        if first > 1:
            assert f"resumed from run/checkpoints/step-{first - 1:08d}" in run.stderr
        here = rows_by_step(parts)
        assert min(here) == first
        joined |= {step: rows for step, rows in here.items() if step <= last}
        for file in parts.glob("rows-*.jsonl"):
            file.unlink()

    assert joined == expected
    ours, theirs = train_rows(parts / "run"), train_rows(whole / "run")
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
    assert [row["loss_tokens"] for row in ours] == [row["loss_tokens"] for row in theirs]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, documents: Path, cache: Path) -> Path:
    """A finished run of two processes under ZeRO-2."""
    folder = tmp_path_factory.mktemp("sharded")
    prepare_folder(folder, documents, train={"max_steps": 2})
    run = start("train", "recipe.yaml", cwd=folder, cache=cache, ranks=2, kind="cpu_zero2")
    assert run.wait() == 0, run.stderr
    return folder


@pytest.mark.parametrize(
    ("ranks", "kind", "name"),
    [(3, "cpu_zero2", "zero2"), (2, "cpu_zero3", "zero3"), (2, "cpu", "ddp"), (1, "cpu", "single")],
)
def test_shards_are_refused_by_any_other_engine(sharded: Path, cache: Path, ranks: int, kind: str, name: str) -> None:
    run = start("train", "recipe.yaml", cwd=sharded, cache=cache, ranks=ranks, kind=kind)
    assert run.wait() == 4
    assert set(run.exit_codes) == {4}
    assert "contains the state of 2 processes under zero2" in run.stderr
    assert f"this run has {ranks} under {name}" in run.stderr
    assert "Start it as before (2 processes, zero2)" in run.stderr
    assert "set model.path to an exported model" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stderr.count("error:") == 1
    assert [path.name for path in (sharded / "run/checkpoints").iterdir()] == ["step-00000002"]


def test_a_changed_recipe_is_refused_unless_it_is_meant(tmp_path: Path, documents: Path, cache: Path) -> None:
    prepare_folder(tmp_path, documents, train={"max_steps": 3})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr

    changed = ("train", "recipe.yaml", "optim.lr=0.005", "optim.warmup=2")
    run = start(*changed, cwd=tmp_path, cache=cache)
    assert run.wait() == 4
    assert "optim.lr: 0.01 in the checkpoint, 0.005 now" in run.stderr
    assert "optim.warmup: 3.0 in the checkpoint, 2.0 now" in run.stderr
    assert "accept the changes: --accept optim.lr --accept optim.warmup" in run.stderr
    assert "Traceback" not in run.stderr

    run = start(*changed, "--accept", "optim.lr", cwd=tmp_path, cache=cache)
    assert run.wait() == 4
    assert "optim.lr" not in run.stderr
    assert "optim.warmup: 3.0 in the checkpoint, 2.0 now" in run.stderr

    run = start(*changed, "--accept", "optim.lr", "--accept", "optim.warmup", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert "resumed from run/checkpoints/step-00000003" in run.stderr


def test_a_failure_before_the_group_forms_is_told_once(sharded: Path, cache: Path) -> None:
    """Also if one rank starts only after the other has failed."""
    place: dict[str, Any] = {"cwd": sharded, "cache": cache, "ranks": 2, "kind": "cpu_zero3"}
    for _ in range(2):
        run = start("train", "recipe.yaml", "run_dir=run", patches=["begin_after_rank_0_failed"], **place)
        assert run.wait() == 4
        assert run.stderr.count("error:") == 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.seed=1", "train.seed: 0 in the checkpoint, 1 now"),
        ("batch.global_size=24", "batch.global_size: 12 in the checkpoint, 24 now"),
        ("model.config.hidden_size=64", "model.config.hidden_size: 32 in the checkpoint, 64 now"),
        ("data.max_length=32", "data.max_length: 64 in the checkpoint, 32 now"),
    ],
)
def test_what_decides_the_numbers_may_not_change(sharded: Path, cache: Path, override: str, said: str) -> None:
    run = start("train", "recipe.yaml", override, cwd=sharded, cache=cache, ranks=2, kind="cpu_zero2")
    assert run.wait() == 4
    assert said in run.stderr


def test_other_documents_are_refused(sharded: Path, tmp_path: Path, cache: Path) -> None:
    recipe = json.loads((sharded / "recipe.yaml").read_text())
    text = Path(recipe["data"]["train"][0]["path"]).read_text()
    (tmp_path / "other.txt").write_text(text.replace("a", "e", 1))
    other = f"data.train=[{{path: {tmp_path / 'other.txt'}, document: line}}]"
    run = start("train", "recipe.yaml", other, cwd=sharded, cache=cache, ranks=2, kind="cpu_zero2")
    assert run.wait() == 4
    assert "data.train: other contents in data.train[0]" in run.stderr
    assert "--accept data.train" in run.stderr


def test_what_only_decides_the_speed_may_change(tmp_path: Path, documents: Path, cache: Path) -> None:
    prepare_folder(tmp_path, documents, train={"max_steps": 2})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    moved = tmp_path / "moved.txt"
    moved.write_bytes(documents.read_bytes())
    free = ["batch.micro_size=3", "batch.group_by_length=false", "eval.max_rows=5", "save.every=1", "log.every=2"]
    free += ["model.gradient_checkpointing=true", f"data.train=[{{path: {moved}, document: line}}]"]
    run = start("train", "recipe.yaml", *free, cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert "resumed from run/checkpoints/step-00000002" in run.stderr


def test_a_finished_run_trains_longer(tmp_path: Path, documents: Path, cache: Path) -> None:
    """With a schedule that does not depend on the number of updates, as if it had this many from the start."""
    longer = ["train.max_steps=6", "--accept", "train.max_steps"]
    for name in ("parts", "whole"):
        changes = {"optim": {"schedule": "constant"}, "train": {"max_steps": 3 if name == "parts" else 6}}
        prepare_folder(tmp_path / name, documents, **changes, save={"every": 3}, eval={"every": 3})
        run = start("train", "recipe.yaml", cwd=tmp_path / name, cache=cache)
        assert run.wait() == 0, run.stderr
    refused = start("train", "recipe.yaml", longer[0], cwd=tmp_path / "parts", cache=cache)
    assert refused.wait() == 4
    assert "accept the changes: --accept train.max_steps" in refused.stderr
    run = start("train", "recipe.yaml", *longer, cwd=tmp_path / "parts", cache=cache)
    assert run.wait() == 0, run.stderr
    assert outcome(tmp_path / "parts/run") == outcome(tmp_path / "whole/run")
