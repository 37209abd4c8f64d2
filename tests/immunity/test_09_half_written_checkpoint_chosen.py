"""9: an incomplete newest checkpoint is chosen; or it is skipped, and the run starts from zero."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptft_dist.checkpoint.checkpoint import Checkpoints, OneProcess
from ptft_dist.checkpoint.resume import Resume
from ptft_dist.errors import CheckpointError


def save(checkpoints: Checkpoints, step: int) -> Path:
    facts = {"identity": {"seed": 0}, "kind": "single", "world_size": 1}
    return checkpoints.commit(
        step, lambda p: (p / "weights").write_bytes(bytes(step)) and None, facts, OneProcess()
    ).path


def choose(checkpoints: Checkpoints) -> tuple[int | None, str]:
    said: list[str] = []
    resume = Resume(checkpoints, "auto", (), {"seed": 0}, lambda _kind, _ranks: None)
    resume.precheck()
    chosen = resume.choose(OneProcess(), said.append)
    resume.begin(chosen, said.append, None)
    return (None if chosen is None else chosen.step), "\n".join(said)


def test_what_a_killed_save_leaves_has_another_name(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    (tmp_path / ".partial-step-00000020").mkdir()
    (tmp_path / ".partial-step-00000020/weights").write_bytes(bytes(15))
    assert choose(checkpoints) == (10, "removed the incomplete checkpoint step-00000020")


def test_half_a_copy_under_the_right_name_is_told_loudly(tmp_path: Path) -> None:
    """An incomplete copy between disks: the manifest exists, but a part of the weights is missing."""
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 10)
    weights = save(checkpoints, 20) / "weights"
    weights.write_bytes(bytes(13))
    step, said = choose(checkpoints)
    assert step == 10
    assert f"DAMAGED CHECKPOINT, not used: {weights} has 13 bytes instead of 20" in said


def test_if_it_is_the_only_one_nothing_starts_from_zero(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = save(checkpoints, 10)
    (path / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        choose(checkpoints)
    assert json.loads((path / "manifest.json").read_text())["step"] == 10  # and nothing is taken away


def test_without_any_it_does_start_from_zero(tmp_path: Path) -> None:
    assert choose(Checkpoints(tmp_path)) == (None, "")
