"""P3: a resume reports and skips damaged checkpoints and uses the last good one; a full disk loses no checkpoint."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from preloaded_ranks import forked_ptft
from support import outcome, rows, start, state_digest, write_recipe

STEPS = 8


def prepare_folder(folder: Path, documents: Path) -> None:
    write_recipe(folder, documents, train={"max_steps": STEPS}, save={"every": 2}, eval={"every": 4})


def checkpoint(folder: Path, step: int = STEPS) -> Path:
    return folder / f"run/checkpoints/step-{step:08d}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, documents: Path, cache: Path) -> Path:
    """A run of one process with checkpoints at 2, 4, 6 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    prepare_folder(folder, documents)
    run = start("train", "recipe.yaml", cwd=folder, cache=cache)
    assert run.wait() == 0, run.stderr
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to be damaged."""
    return shutil.copytree(finished, tmp_path / "copy")


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 1
    path.write_bytes(raw)


def edit_manifest(path: Path) -> None:
    """Change the hash of another file, so that the manifest stays valid JSON."""
    manifest = json.loads(path.read_text())
    manifest["files"]["model.safetensors"]["sha256"] = manifest["files"]["optimizer.safetensors"]["sha256"]
    path.write_text(json.dumps(manifest))


DAMAGES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "truncated weights": ("model.safetensors", truncate, "model.safetensors has "),
    "a flipped bit in the optimizer": ("optimizer.safetensors", flip, "optimizer.safetensors was altered"),
    "a missing file": ("optimizer.json", Path.unlink, "optimizer.json is missing"),
    "no manifest": ("manifest.json", Path.unlink, "step-00000008 has no manifest.json"),
    "an altered manifest": ("manifest.json", edit_manifest, "manifest.json was altered"),
    "a torn manifest": ("manifest.json", truncate, "manifest.json cannot be read"),
    "a manifest of zeros": ("manifest.json", lambda path: path.write_bytes(bytes(500)), "manifest.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_goes_on_from_the_one_before(finished: Path, folder: Path, cache: Path, damage: str) -> None:
    name, change, said = DAMAGES[damage]
    change(checkpoint(folder) / name)
    shutil.rmtree(folder / "run/model")
    listing = start("checkpoints", "run", cwd=folder, cache=cache)
    assert listing.wait() == 4
    assert said in listing.stdout
    assert listing.stdout.count("good") == 3
    assert "1 of 4 checkpoints are damaged" in listing.stderr

    given = start("train", "recipe.yaml", "--resume", str(checkpoint(folder)), cwd=folder, cache=cache)
    assert given.wait() == 4
    assert said in given.stderr
    assert "Traceback" not in given.stderr

    run = start("train", "recipe.yaml", cwd=folder, cache=cache)
    assert run.wait() == 0, run.stderr
    assert "DAMAGED CHECKPOINT, not used: " in run.stderr
    assert said in run.stderr
    assert "resumed from run/checkpoints/step-00000006, update 6 of 8" in run.stderr
    assert "step-00000008 is no longer part of this run: renamed to aside-" in run.stderr
    assert outcome(folder / "run") == outcome(finished / "run")
    assert len(list((folder / "run/checkpoints").glob("aside-*-step-00000008"))) == 1


def test_when_all_are_damaged_it_stops_and_deletes_nothing(folder: Path, cache: Path) -> None:
    for step in (2, 4, 6, 8):
        flip(checkpoint(folder, step) / "model.safetensors")
    before = {path: path.read_bytes() for path in (folder / "run/checkpoints").rglob("*") if path.is_file()}
    curves = rows(folder / "run")
    run = start("train", "recipe.yaml", cwd=folder, cache=cache)
    assert run.wait() == 4
    assert run.stderr.count("DAMAGED CHECKPOINT") == 4
    assert "every checkpoint in run/checkpoints is damaged" in run.stderr
    assert "--resume never" in run.stderr
    assert "Traceback" not in run.stderr
    assert {path: path.read_bytes() for path in (folder / "run/checkpoints").rglob("*") if path.is_file()} == before
    assert rows(folder / "run") == curves

    run = start("train", "recipe.yaml", "--resume", "never", cwd=folder, cache=cache)
    assert run.wait() == 0, run.stderr
    assert len(list((folder / "run/checkpoints").glob("aside-*"))) == 4
    assert rows(folder / "run") == curves


def test_a_path_to_nothing_and_to_an_older_checkpoint(finished: Path, folder: Path, cache: Path) -> None:
    run = start("train", "recipe.yaml", "--resume", "run/checkpoints/step-00000005", cwd=folder, cache=cache)
    assert run.wait() == 4
    assert "run/checkpoints/step-00000005 does not exist" in run.stderr

    run = start("train", "recipe.yaml", "--resume", "run/checkpoints/step-00000004", cwd=folder, cache=cache)
    assert run.wait() == 0, run.stderr
    assert "resumed from run/checkpoints/step-00000004" in run.stderr
    assert outcome(folder / "run") == outcome(finished / "run")


def test_a_damaged_shard_is_never_unpickled(tmp_path: Path, documents: Path, cache: Path) -> None:
    """Rank 1's shard is replaced by a pickle that would run code; both ranks resume from the previous checkpoint."""
    prepare_folder(tmp_path, documents)
    place: dict[str, Any] = {"cwd": tmp_path, "cache": cache, "ranks": 2, "kind": "cpu_zero2"}
    run = start("train", "recipe.yaml", **place)
    assert run.wait() == 0, run.stderr
    whole = outcome(tmp_path / "run")

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    (shard,) = checkpoint(tmp_path).rglob("*pp_rank_1*optim_states.pt")
    size = shard.stat().st_size
    bomb = pickle.dumps(Bomb())
    shard.write_bytes(bomb + bytes(size - len(bomb)))

    run = start("train", "recipe.yaml", **place)
    assert run.wait() == 0, run.stderr
    assert f"{shard.name} was altered" in run.stderr
    assert "resumed from run/checkpoints/step-00000006" in run.stderr
    assert not (tmp_path / "exploded").exists()
    assert outcome(tmp_path / "run") == whole


def test_the_real_command_tells_of_damage(folder: Path) -> None:
    good = forked_ptft("checkpoints", "run", cwd=folder)
    assert good.returncode == 0
    assert [line.split()[0] for line in good.stdout.splitlines()] == [f"step-{step:08d}" for step in (2, 4, 6, 8)]
    flip(checkpoint(folder, 4) / "model.safetensors")
    damaged = forked_ptft("checkpoints", "run", cwd=folder)
    assert damaged.returncode == 4
    assert "run/checkpoints/step-00000004/model.safetensors was altered" in damaged.stdout
    assert damaged.stderr == "error: 1 of 4 checkpoints are damaged\n"


# --- a full disk ------------------------------------------------------------------------------------------------------


# How the disk is filled before the save at step 4, which needs 500 kB -> what is said.
FULL = {
    "before it begins": (["fill_disk_before_save:4:0"], "bytes are needed"),
    "in the middle of it": (["fill_disk_before_save:4:300000", "no_estimate"], "No space left on device"),
}


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, documents: Path, cache: Path, finished: Path
) -> Callable[[int, str], Path]:
    """The run directory of a run whose disk was never full, for each number of ranks and kind."""
    done = {(1, "cpu"): finished / "run"}

    def provide(ranks: int, kind: str) -> Path:
        if (ranks, kind) not in done:
            folder = tmp_path_factory.mktemp("undisturbed")
            prepare_folder(folder, documents)
            run = start("train", "recipe.yaml", cwd=folder, cache=cache, ranks=ranks, kind=kind)
            assert run.wait() == 0, run.stderr
            done[ranks, kind] = folder / "run"
        return done[ranks, kind]

    return provide


@pytest.mark.parametrize("when", FULL)
@pytest.mark.parametrize(("ranks", "kind"), [(1, "cpu"), (2, "cpu"), (2, "fsdp2")], ids=["one", "ddp", "fsdp2"])
def test_a_full_disk_costs_one_save(
    tmp_path: Path,
    documents: Path,
    cache: Path,
    disk: Path,
    undisturbed: Callable[[int, str], Path],
    ranks: int,
    kind: str,
    when: str,
) -> None:
    prepare_folder(tmp_path, documents)
    place: dict[str, Any] = {"cwd": tmp_path, "cache": cache, "ranks": ranks, "kind": kind}
    whole = undisturbed(ranks, kind)

    patches, said = FULL[when]
    run = start("train", "recipe.yaml", "run_dir=disk/run", patches=patches, **place)
    assert run.wait() == 0, run.stderr
    assert run.stderr.count("SAVE FAILED at update 4, training continues: the checkpoint was not written") == 1
    assert "earlier ones are untouched" in run.stderr
    assert said in run.stderr
    names = sorted(path.name for path in (disk / "run/checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000006", "step-00000008"]  # and nothing hidden beside them
    assert state_digest(disk / "run/checkpoints/step-00000002") == state_digest(whole / "checkpoints/step-00000002")
    assert outcome(disk / "run") == outcome(whole)


def test_rows_that_found_no_room_are_written_later(tmp_path: Path, documents: Path, cache: Path, disk: Path) -> None:
    """The disk is full for fifty updates, more than fits into the last page of an open file."""
    prepare_folder(tmp_path, documents)
    long = ["train", "recipe.yaml", "train.max_steps=110", "save.every=50", "eval.every=20", "eval.max_rows=4"]
    long += ["batch.global_size=2", "batch.micro_size=2"]
    place: dict[str, Any] = {"cwd": tmp_path, "cache": cache}
    whole = start(*long, "run_dir=whole", **place)
    assert whole.wait() == 0, whole.stderr
    run = start(*long, "run_dir=disk/run", patches=["fill_disk_before_save:50:0"], **place)
    assert run.wait() == 0, run.stderr
    assert (
        "metrics.jsonl: No space left on device; its rows are kept in memory until it can be written again"
        in run.stderr
    )
    assert run.stderr.count("tensorboard: No space left on device; TensorBoard gets no more points") == 1
    assert outcome(disk / "run") == outcome(tmp_path / "whole")


def test_a_disk_that_is_full_at_the_end_fails_the_run_and_keeps_the_rest(
    tmp_path: Path, documents: Path, cache: Path, disk: Path
) -> None:
    prepare_folder(tmp_path, documents)
    arguments = ("train", "recipe.yaml", "run_dir=disk/run")
    run = start(*arguments, cwd=tmp_path, cache=cache, patches=["fill_disk_before_save:8:0"])
    assert run.wait() == 78, run.stderr
    assert "error: the checkpoint was not written; earlier ones are untouched" in run.stderr
    assert "Traceback" not in run.stderr
    assert sorted(path.name for path in (disk / "run/checkpoints").iterdir())[-1] == "step-00000006"

    (disk / "filler").unlink()
    run = start(*arguments, cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert "resumed from disk/run/checkpoints/step-00000006" in run.stderr
    assert [row["step"] for row in rows(disk / "run") if "loss" in row] == list(range(1, STEPS + 1))


def test_a_shard_on_a_full_disk(tmp_path: Path, documents: Path, cache: Path, disk: Path) -> None:
    """In the middle of the file; torch raises a RuntimeError without a number."""
    prepare_folder(tmp_path, documents)
    patches = ["fill_disk_before_save:4:300000", "no_estimate"]
    words = ("train", "recipe.yaml", f"run_dir={disk / 'run'}")
    run = start(*words, cwd=tmp_path, cache=cache, kind="cpu_zero2", patches=patches)
    assert run.wait() == 78, run.stderr
    assert "a shard of the checkpoint could not be written" in run.stderr
    assert "No space left on device" in run.stderr


def test_a_rank_that_cannot_write_its_shard_leaves_no_rank_waiting(
    tmp_path: Path, documents: Path, cache: Path
) -> None:
    """A rank that waits in DeepSpeed's save is unreachable; the run ends, and resumes from the previous checkpoint."""
    prepare_folder(tmp_path, documents)
    place: dict[str, Any] = {"cwd": tmp_path, "cache": cache, "ranks": 2, "kind": "cpu_zero2"}
    run = start("train", "recipe.yaml", patches=["break_shard:1:8"], **place)
    run.processes[1].join(60)
    assert run.exit_codes[1] == 78, run.stderr
    assert "No space left" in run.stderr
    run.kill()  # as a launcher does when one of its ranks has ended; without one, gloo notices at the next message
    whole = start("checkpoints", "run", cwd=tmp_path, cache=cache)
    assert whole.wait() == 0, whole.stderr
    again = start("train", "recipe.yaml", **place)
    assert again.wait() == 0, again.stderr
    assert "resumed from" in again.stderr
    assert "removed the incomplete checkpoint step-00000008" in again.stderr
