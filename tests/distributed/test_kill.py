"""P2: a run that is killed at any point, any number of times, ends with the same bits as one that is not."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from preloaded_ranks import preloaded
from support import (
    COMMAND,
    Start,
    environment,
    last_step,
    lives,
    outcome,
    rows,
    start,
    train_rows,
    wait_until,
    write_recipe,
)

STEPS, SAVE_EVERY, EVAL_EVERY = 9, 3, 4
CASES = [(1, "cpu"), (2, "cpu"), (2, "cpu_zero2"), (2, "cpu_zero3"), (2, "fsdp2")]
NAMES = ["one", "ddp", "zero2", "zero3", "fsdp2"]


def prepare_folder(folder: Path, documents: Path, ranks: int, **changes: Any) -> None:
    """A recipe with dropout, and three micro-batches per rank in each update."""
    recipe: dict[str, Any] = {
        "model": {"config": {"attention_dropout": 0.1}},
        "batch": {"global_size": 12, "micro_size": 12 // ranks // 3},
        "train": {"max_steps": STEPS},
        "save": {"every": SAVE_EVERY},
        "eval": {"every": EVAL_EVERY, "micro_size": 12},
        "data": {"validation": 0.04},
    }
    write_recipe(folder, documents, **recipe | changes)


def killed(run: Start, run_dir: Path) -> None:
    """Kill all ranks, and check that the run had not finished."""
    run.kill()
    assert set(run.exit_codes) == {-signal.SIGKILL}, run.stderr
    assert not (run_dir / "result.json").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, documents: Path, cache: Path) -> Callable[[int, str], Path]:
    """The run directory of a run that was never killed, for each number of ranks and kind."""
    finished: dict[tuple[int, str], Path] = {}

    def provide(ranks: int, kind: str) -> Path:
        if (ranks, kind) not in finished:
            folder = tmp_path_factory.mktemp("whole")
            prepare_folder(folder, documents, ranks)
            run = start("train", "recipe.yaml", cwd=folder, cache=cache, ranks=ranks, kind=kind)
            assert run.wait() == 0, run.stderr
            finished[ranks, kind] = folder / "run"
        return finished[ranks, kind]

    return provide


@pytest.mark.parametrize(("ranks", "kind"), CASES, ids=NAMES)
def test_three_kills_change_no_bit(
    tmp_path: Path, documents: Path, cache: Path, whole: Callable[[int, str], Path], ranks: int, kind: str
) -> None:
    chance = random.Random(f"{ranks} {kind}")
    early, in_save, late = chance.choice([1, 2]), chance.choice([3, 6]), chance.choice([7, 8])
    prepare_folder(tmp_path, documents, ranks)
    place: dict[str, Any] = {"cwd": tmp_path, "cache": cache, "ranks": ranks, "kind": kind}
    run_dir = tmp_path / "run"

    run = start("train", "recipe.yaml", patches=["slow_updates:0.1"], **place)
    run.until(lambda: last_step(run_dir) >= early, f"update {early}")
    killed(run, run_dir)
    assert not list(run_dir.glob("checkpoints/step-*"))

    run = start("train", "recipe.yaml", patches=[f"hang_in_save:{in_save}"], **place)
    partial = run_dir / f"checkpoints/.partial-step-{in_save:08d}"
    run.until(lambda: partial.exists() and any(partial.rglob("*.*")), "a save to begin")
    killed(run, run_dir)
    assert partial.exists()
    assert not (partial / "manifest.json").exists()

    run = start("train", "recipe.yaml", patches=["slow_updates:0.1"], **place)
    run.until(lambda: last_step(run_dir) >= late, f"update {late}")
    killed(run, run_dir)
    assert not partial.exists()

    run = start("train", "recipe.yaml", **place)
    assert run.wait() == 0, run.stderr
    assert f"resumed from run/checkpoints/step-00000006, update 6 of {STEPS}" in run.stderr
    assert outcome(run_dir) == outcome(whole(ranks, kind))
    assert [row["step"] for row in train_rows(run_dir)] == list(range(1, STEPS + 1))


def test_three_processes_and_several_buckets(tmp_path: Path, documents: Path, cache: Path) -> None:
    """With three or more ranks, DDP's order of summation depends on its buckets, rebuilt at its first step."""
    wide = {"num_hidden_layers": 2, "hidden_size": 160, "intermediate_size": 480, "attention_dropout": 0.1}
    prepare_folder(tmp_path, documents, 3, model={"config": wide}, batch={"micro_size": 1})
    place: dict[str, Any] = {"cwd": tmp_path, "cache": cache, "ranks": 3}
    whole = start("train", "recipe.yaml", "run_dir=whole", **place)
    assert whole.wait() == 0, whole.stderr

    run_dir = tmp_path / "run"
    run = start("train", "recipe.yaml", patches=["slow_updates:0.1"], **place)
    run.until(lambda: last_step(run_dir) >= 4, "update 4")
    killed(run, run_dir)
    run = start("train", "recipe.yaml", **place)
    assert run.wait() == 0, run.stderr
    assert "resumed from run/checkpoints/step-00000003" in run.stderr
    assert outcome(run_dir) == outcome(tmp_path / "whole")


def test_everything_of_a_launched_run_is_killed(tmp_path: Path, documents: Path, cache: Path) -> None:
    """The command and its launcher are killed together with the ranks; the second start has no launcher."""
    prepare_folder(tmp_path, documents, 2, train={"max_steps": 2000}, save={"every": 2, "keep": 2}, eval={"every": 900})
    words = [*COMMAND, "train", "recipe.yaml", "--launch", "cpu", "--processes", "2"]
    command = psutil.Popen(words, cwd=tmp_path, env=environment({"PTFT_CACHE": str(cache), **preloaded()}))
    wait_until(lambda: last_step(tmp_path / "run") >= 3, "update 3", timeout_s=120)
    family = [command, *command.children(recursive=True)]
    assert len(family) >= 4  # ptft, accelerate launch and two ranks
    for process in family:
        process.kill()
    command.wait()
    wait_until(lambda: not any(map(lives, family)), "the end of all")  # orphans may remain as zombies
    count = last_step(tmp_path / "run") + 6
    assert count < 2000

    for name in ("run", "whole"):  # the killed run goes on; another makes as many updates in one go
        run = start("train", "recipe.yaml", f"run_dir={name}", cwd=tmp_path, cache=cache, ranks=2)
        run.until(lambda run_dir=tmp_path / name: last_step(run_dir) >= count, f"update {count}")
        run.kill()
        assert ("resumed from run/checkpoints/step-" in run.stderr) == (name == "run")
    assert rows(tmp_path / "run")[:count] == rows(tmp_path / "whole")[:count]


@pytest.mark.parametrize(("ranks", "kind"), [(1, "cpu"), (2, "cpu"), (2, "cpu_zero3")], ids=["one", "ddp", "zero3"])
def test_how_often_it_saves_and_evaluates_does_not_matter(
    tmp_path: Path, documents: Path, cache: Path, whole: Callable[[int, str], Path], ranks: int, kind: str
) -> None:
    prepare_folder(tmp_path, documents, ranks)
    often = ["save.every=1", "save.best=true", "eval.every=1", "eval.at_start=true", "eval.micro_size=1"]
    run = start("train", "recipe.yaml", *often, cwd=tmp_path, cache=cache, ranks=ranks, kind=kind)
    assert run.wait() == 0, run.stderr
    seldom, ours = whole(ranks, kind), tmp_path / "run"
    assert len(rows(seldom)) == STEPS + 3
    assert len(rows(ours)) == STEPS + STEPS + 1
    assert train_rows(ours) == train_rows(seldom)
    assert outcome(ours) | {"rows": None} == outcome(seldom) | {"rows": None}


def test_evaluation_drops_nothing(
    whole: Callable[[int, str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation of the run with dropout equals an evaluation of the exported model, row by row."""
    import torch
    import torch.nn.functional as F
    from prepare_support import prepare
    from transformers import AutoModelForCausalLM

    from ptft_dist.api import load_recipe

    run_dir = whole(1, "cpu")
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    recipe = load_recipe(str(run_dir / "recipe.yaml")).recipe
    store = prepare(recipe, run_dir).validation
    assert store is not None
    model = AutoModelForCausalLM.from_pretrained(run_dir / "model").eval()
    assert model.config.attention_dropout == 0.1
    rows_of_ids = [torch.from_numpy(store.row(i).input_ids) for i in range(len(store))]
    with torch.no_grad():
        losses = [F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum") for ids in rows_of_ids]
    mean = torch.stack(losses).sum().item() / sum(len(ids) - 1 for ids in rows_of_ids)
    assert rows(run_dir)[-1]["eval/loss"] == pytest.approx(mean, rel=1e-5)
