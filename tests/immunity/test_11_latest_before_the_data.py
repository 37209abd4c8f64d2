"""11: the name of the newest checkpoint is on the disk before its data, which a power failure reveals."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ptft_dist.checkpoint.checkpoint import Checkpoints, OneProcess


def test_every_byte_is_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        partial = next(tmp_path.glob(".partial-*"), None)
        if path.name != "manifest.json" and partial is not None and path.is_file():
            assert not (partial / "manifest.json").exists()  # written when all else is safe
        happened.append(("fsync", str(path.relative_to(tmp_path))))
        fsync(descriptor)

    def watched_rename(source: str, target: str, **kwargs: int) -> None:
        happened.append(("rename", str(Path(target).relative_to(tmp_path))))
        rename(source, target, **kwargs)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)

    def write(folder: Path) -> None:
        (folder / "shards").mkdir()
        for name in ("weights", "shards/0", "shards/1"):
            (folder / name).write_bytes(b"state")

    Checkpoints(tmp_path).commit(7, write, {}, OneProcess())

    partial = ".partial-step-00000007"
    data = [("fsync", f"{partial}/{name}") for name in ("shards/0", "shards/1", "weights")]
    folders = [("fsync", partial), ("fsync", f"{partial}/shards")]
    assert sorted(happened[:3]) == data
    assert happened[3] == ("fsync", f"{partial}/manifest.json")
    assert sorted(happened[4:6]) == folders
    assert happened[6:] == [("rename", "step-00000007"), ("fsync", ".")]
