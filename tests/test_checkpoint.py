"""Checkpoints on disk are complete or absent after kills, write errors and full disks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ptft_dist.checkpoint import checkpoint as module
from ptft_dist.checkpoint.checkpoint import (
    Checkpoint,
    Checkpoints,
    OneProcess,
    SaveError,
    read_checkpoint,
    record,
    verify,
)
from ptft_dist.errors import CheckpointError

FACTS = {"world_size": 1, "progress": {"step": 7}}


def write_files(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "shards").mkdir()
    (folder / "shards/rank-0.bin").write_bytes(b"rank 0")


def committed(folder: Path, *steps: int) -> Checkpoints:
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.commit(step, write_files, FACTS, OneProcess())
    return checkpoints


def names(folder: Path) -> list[str]:
    """All names in a directory, including hidden ones."""
    return sorted(path.name for path in folder.iterdir())


def newest(checkpoints: Checkpoints) -> tuple[int | None, list[str]]:
    """The step of the newest undamaged checkpoint, and the messages."""
    said: list[str] = []
    found = checkpoints.newest_good(OneProcess(), said.append)
    return (None if found is None else found.step), said


def test_what_a_checkpoint_is(tmp_path: Path) -> None:
    checkpoints = committed(tmp_path / "checkpoints", 7)
    folder = tmp_path / "checkpoints/step-00000007"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["step"] == 7
    assert manifest["progress"] == {"step": 7}
    assert manifest["files"] == {
        "weights.bin": {"bytes": 10240, "sha256": hashlib.sha256(bytes(range(256)) * 40).hexdigest()},
        "shards/rank-0.bin": {"bytes": 6, "sha256": hashlib.sha256(b"rank 0").hexdigest()},
    }
    assert names(tmp_path / "checkpoints") == ["step-00000007"]
    assert read_checkpoint(folder).step == 7
    assert verify(read_checkpoint(folder)) == []
    assert newest(checkpoints) == (7, [])


def test_there_are_none_before_the_first(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "nothing")
    assert checkpoints.paths() == []
    assert newest(checkpoints) == (None, [])
    checkpoints.clean(print)
    checkpoints.set_aside_after(-1, print)
    checkpoints.retain(1, None, print)


def test_the_newest_is_the_one_with_the_largest_number(tmp_path: Path) -> None:
    checkpoints = committed(tmp_path, 9, 10, 99_999_999, 100_000_000)
    for other in ("step-abc", "step-1", ".partial-step-999999999", "aside-20260101-000000-step-200000000"):
        (tmp_path / other).mkdir()
    assert [path.name for path in checkpoints.paths()] == [
        "step-00000009",
        "step-00000010",
        "step-99999999",
        "step-100000000",
    ]
    assert newest(checkpoints) == (100_000_000, [])


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 16
    path.write_bytes(raw)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: os.truncate(p / "weights.bin", 10239), "weights.bin has 10239 bytes instead of 10240"),
    "longer": (lambda p: (p / "weights.bin").write_bytes(bytes(10241)), "weights.bin has 10241 bytes"),
    "a flipped bit": (lambda p: flip(p / "weights.bin"), "weights.bin was altered"),
    "a nested file gone": (lambda p: (p / "shards/rank-0.bin").unlink(), "shards/rank-0.bin is missing"),
    "a folder instead": (
        lambda p: ((p / "weights.bin").unlink(), (p / "weights.bin").mkdir()),
        "weights.bin is missing",
    ),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "has no manifest.json"),
    "an empty manifest": (lambda p: (p / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "a manifest of another kind": (lambda p: (p / "manifest.json").write_text("[]"), "manifest.json cannot be read"),
    "a manifest of bytes": (lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json cannot be read"),
    "a manifest without its hash": (lambda p: (p / "manifest.json").write_text("{}"), "manifest.json cannot be read"),
    "an altered manifest": (lambda p: edit(p / "manifest.json", step=9), "manifest.json was altered"),
    "a manifest that forgets a file": (lambda p: edit(p / "manifest.json", files={}), "manifest.json was altered"),
}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    checkpoints = committed(tmp_path, 1, 2, 3)
    change, said = DAMAGES[damage]
    change(tmp_path / "step-00000003")
    step, warnings = newest(checkpoints)
    assert step == 2
    assert len(warnings) == 1
    assert warnings[0].startswith("DAMAGED CHECKPOINT, not used: ")
    assert str(tmp_path / "step-00000003") in warnings[0]
    assert said in warnings[0]
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]


def test_when_none_is_good_nothing_begins_from_zero(tmp_path: Path) -> None:
    checkpoints = committed(tmp_path, 1, 2)
    flip(tmp_path / "step-00000001/weights.bin")
    flip(tmp_path / "step-00000002/weights.bin")
    warnings: list[str] = []
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged .* --resume never"):
        checkpoints.newest_good(OneProcess(), warnings.append)
    assert len(warnings) == 2
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_run_is_no_checkpoint(tmp_path: Path) -> None:
    """The message names its newest one."""
    committed(tmp_path / "run/checkpoints", 2, 10)
    with pytest.raises(CheckpointError, match=r"run is a run, not a checkpoint; its newest one is .*/step-00000010$"):
        read_checkpoint(tmp_path / "run")


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT", 2)
    committed(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 2; this version reads format 1"):
        read_checkpoint(tmp_path / "step-00000001")


# --- a save that fails ------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_in_the_middle(tmp_path: Path) -> None:
    checkpoints = committed(tmp_path, 1)
    before = (tmp_path / "step-00000001/manifest.json").read_bytes()

    def write(folder: Path) -> None:
        (folder / "weights.bin").write_bytes(bytes(5000))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "weights.bin"))

    with pytest.raises(SaveError, match=r"not written; earlier ones are untouched: rank 0: OSError: .*No space left"):
        checkpoints.commit(2, write, FACTS, OneProcess())
    assert names(tmp_path) == ["step-00000001"]
    assert (tmp_path / "step-00000001/manifest.json").read_bytes() == before
    checkpoints.commit(2, write_files, FACTS, OneProcess())
    assert newest(checkpoints) == (2, [])


@pytest.mark.parametrize("function", ["_seal", "_write_manifest", "_fsync"])
def test_a_failure_at_any_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    checkpoints = committed(tmp_path, 1)

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(module, function, fail)
    with pytest.raises(SaveError, match="the disk is broken"):
        checkpoints.commit(2, write_files, FACTS, OneProcess())
    monkeypatch.undo()
    assert newest(checkpoints) == (1, [])
    assert names(tmp_path) == ["step-00000001"]


def test_a_save_that_cannot_fit_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    checkpoints = committed(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=999))
    begun: list[Path] = []
    with pytest.raises(SaveError, match="about 1,000 bytes are needed, 999 are free"):
        checkpoints.commit(2, begun.append, FACTS, OneProcess(), need_bytes=1000)
    assert begun == []
    assert names(tmp_path) == ["step-00000001"]
    checkpoints.commit(2, write_files, FACTS, OneProcess(), need_bytes=999)


# --- killed between any two operations --------------------------------------------------------------------------------


FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}


def killed_at(operation: int, folder: Path, action: Callable[[], object]) -> bool:
    """Run `action` in a forked process that dies before its nth file operation; whether it came so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if event in FILE_EVENTS:
                # rmtree names what it removes relative to an open directory.
                if (
                    isinstance(args[0], str | Path)
                    and Path(args[0]).is_absolute()
                    and folder not in Path(args[0]).parents
                ):
                    return
                count += 1
                if count == operation:
                    os._exit(9)

        try:
            sys.addaudithook(watch)
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def test_killed_before_any_operation_a_good_one_is_found(tmp_path: Path) -> None:
    """A save with keep=1, in small writes: before each operation on a file the process is killed, and another one
    looks at what is there."""

    def write(folder: Path) -> None:
        for part in range(3):
            with (folder / "weights.bin").open("ab") as file:
                file.write(bytes([part]) * 100)
        (folder / "shards").mkdir()
        (folder / "shards/rank-0.bin").write_bytes(b"rank 0")

    def save() -> None:
        checkpoints.commit(2, write, FACTS, OneProcess())
        checkpoints.retain(1, None, print)

    seen: set[int | None] = set()
    operation = 1
    while True:
        folder = tmp_path / str(operation)
        checkpoints = committed(folder, 1)
        if not killed_at(operation, folder, save):
            break
        step, warnings = newest(checkpoints)
        assert step in (1, 2)
        assert warnings == []
        assert all(verify(read_checkpoint(path)) == [] for path in checkpoints.paths())  # none is half-deleted
        seen.add(step)
        checkpoints.clean(lambda _: None)
        assert all(name.startswith("step-") for name in names(folder))
        checkpoints.commit(3, write, FACTS, OneProcess())
        checkpoints.retain(1, None, print)
        assert names(folder) == ["step-00000003"]
        operation += 1
    assert operation > 20
    assert seen == {1, 2}
    assert names(folder) == ["step-00000002"]


def test_killed_before_any_operation_a_recorded_fact_is_the_old_or_the_new(tmp_path: Path) -> None:
    seen = set()
    operation = 1
    while True:
        folder = tmp_path / str(operation)
        checkpoints = committed(folder, 1)
        checkpoint = read_checkpoint(folder / "step-00000001")
        killed = killed_at(operation, folder, lambda found=checkpoint: record(found, progress={"step": 8}))
        assert newest(checkpoints) == (1, [])
        seen.add(read_checkpoint(checkpoint.path).manifest["progress"]["step"])
        record(checkpoint, progress={"step": 9})  # what the kill left is in nobody's way
        assert names(checkpoint.path) == ["manifest.json", "shards", "weights.bin"]
        assert read_checkpoint(checkpoint.path).manifest == checkpoint.manifest | {"progress": {"step": 9}}
        if not killed:
            break
        operation += 1
    assert operation > 3
    assert seen == {7, 8}


def test_a_fact_that_cannot_be_recorded_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed(tmp_path, 1)
    checkpoint = read_checkpoint(tmp_path / "step-00000001")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "the disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        record(checkpoint, progress={"step": 8})
    monkeypatch.undo()
    assert read_checkpoint(checkpoint.path) == checkpoint
    assert names(checkpoint.path) == ["manifest.json", "shards", "weights.bin"]


# --- several ranks ----------------------------------------------------------------------------------------------------


class ThreadRank:
    """A rank that is a thread. Objects are gathered through a shared list."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(shared)
        self._shared, self._barrier = shared, barrier

    def gather_objects(self, value: Any) -> list[Any]:
        self._shared[self.rank] = value
        self._barrier.wait(timeout=10)
        gathered = list(self._shared)
        self._barrier.wait(timeout=10)
        return gathered


def on_ranks(count: int, action: Callable[[ThreadRank], Any]) -> list[Any]:
    """The result or exception of `action` on each rank; the ranks run at the same time."""
    shared: list[Any] = [None] * count
    barrier = threading.Barrier(count)
    results: list[Any] = [None] * count

    def body(rank: int) -> None:
        try:
            results[rank] = action(ThreadRank(rank, shared, barrier))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=body, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return results


def shard(ranks: ThreadRank) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / f"rank-{ranks.rank}.bin").write_bytes(bytes([ranks.rank]) * 100)
        if ranks.rank == 0:
            (folder / "extra.bin").write_bytes(b"of rank 0 alone")

    return write


def test_each_rank_writes_its_own_and_one_manifest_names_all(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    made = on_ranks(3, lambda ranks: checkpoints.commit(5, shard(ranks), FACTS, ranks))
    assert all(isinstance(checkpoint, Checkpoint) for checkpoint in made)
    assert [checkpoint.step for checkpoint in made] == [5, 5, 5]
    files = json.loads((tmp_path / "step-00000005/manifest.json").read_text())["files"]
    assert sorted(files) == ["extra.bin", "rank-0.bin", "rank-1.bin", "rank-2.bin"]
    for rank in range(3):
        assert files[f"rank-{rank}.bin"]["sha256"] == hashlib.sha256(bytes([rank]) * 100).hexdigest()


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_when_one_rank_fails_all_learn_of_it(tmp_path: Path, bad: int) -> None:
    checkpoints = committed(tmp_path, 1)

    def write_or_fail(ranks: ThreadRank) -> Checkpoint:
        def write(folder: Path) -> None:
            shard(ranks)(folder)
            if ranks.rank == bad:
                raise RuntimeError("its shard is lost")

        return checkpoints.commit(2, write, FACTS, ranks)

    errors = on_ranks(3, write_or_fail)
    assert [type(error) for error in errors] == [SaveError] * 3
    assert all(f"rank {bad}: RuntimeError: its shard is lost" in str(error) for error in errors)
    assert names(tmp_path) == ["step-00000001"]


def test_each_file_is_hashed_by_one_rank_and_all_hear_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints(tmp_path)
    on_ranks(3, lambda ranks: checkpoints.commit(5, shard(ranks), FACTS, ranks))
    flip(tmp_path / "step-00000005/rank-1.bin")
    flip(tmp_path / "step-00000005/extra.bin")
    hashed: list[str] = []
    file_hash = module._file_hash
    monkeypatch.setattr(module, "_file_hash", lambda path: (hashed.append(path.name), file_hash(path))[1])

    problems = on_ranks(2, lambda ranks: verify(read_checkpoint(tmp_path / "step-00000005"), ranks))

    assert sorted(hashed) == ["extra.bin", "rank-0.bin", "rank-1.bin", "rank-2.bin"]
    assert problems[0] == problems[1]
    assert [problem.split()[0] for problem in problems[0]] == [
        str(tmp_path / "step-00000005/extra.bin"),
        str(tmp_path / "step-00000005/rank-1.bin"),
    ]


# --- what stays -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "best", "stay"),
    [
        (2, None, [4, 5]),
        (1, 2, [2, 5]),
        (2, 5, [4, 5]),
        (9, None, [1, 2, 3, 4, 5]),
        (None, None, [1, 2, 3, 4, 5]),
    ],
)
def test_retention(tmp_path: Path, keep: int | None, best: int | None, stay: list[int]) -> None:
    checkpoints = committed(tmp_path, 1, 2, 3, 4, 5)
    checkpoints.retain(keep, best, print)
    assert names(tmp_path) == [f"step-{step:08d}" for step in stay]


def test_a_future_that_was_given_up_is_kept_under_another_name(tmp_path: Path) -> None:
    checkpoints = committed(tmp_path, 2, 4, 6)
    said: list[str] = []
    checkpoints.set_aside_after(2, said.append)
    left = names(tmp_path)
    assert left[-1] == "step-00000002"
    assert [name[-13:] for name in left[:-1]] == ["step-00000004", "step-00000006"]
    assert all(name.startswith("aside-") for name in left[:-1])
    assert len(said) == 2
    assert all(verify(read_checkpoint(tmp_path / name)) == [] for name in left)
    checkpoints.retain(1, None, print)
    assert names(tmp_path) == left  # what is set aside is for the user to delete
    assert newest(checkpoints) == (2, [])


def test_what_a_kill_left_is_removed_and_said(tmp_path: Path) -> None:
    checkpoints = committed(tmp_path, 2)
    for leftover in (".partial-step-00000004", ".trash-step-00000001", ".nfs0001"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "weights.bin").write_bytes(b"part")
    said: list[str] = []
    checkpoints.clean(said.append)
    assert names(tmp_path) == [".nfs0001", "step-00000002"]
    assert said == ["removed the incomplete checkpoint step-00000004"]


def test_what_cannot_be_deleted_is_said_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS, while another process reads a file of the directory."""
    checkpoints, said = committed(tmp_path, 1, 2, 3), list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", failing(OSError(39, "Directory not empty")))
        checkpoints.retain(2, None, said.append)
        checkpoints.clean(said.append)
        patch.setattr(Path, "rename", failing(OSError(16, "Device or resource busy")))
        checkpoints.retain(1, None, said.append)
    assert [line[:19] for line in said] == [".trash-step-0000000"] * 2 + ["step-00000002 was n"]
    assert newest(checkpoints) == (3, [])
    checkpoints.retain(1, None, said.append)
    checkpoints.clean(said.append)
    assert names(tmp_path) == ["step-00000003"]
    assert len(said) == 3


def failing(error: Exception) -> Any:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise error

    return fail


def test_the_leftover_of_an_earlier_try_does_not_leak_into_the_next(tmp_path: Path) -> None:
    (tmp_path / ".partial-step-00000002").mkdir()
    (tmp_path / ".partial-step-00000002/stale.bin").write_bytes(b"of a killed save")
    committed(tmp_path, 2)
    assert "stale.bin" not in names(tmp_path / "step-00000002")
