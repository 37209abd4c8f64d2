"""Lists of runs, and the verbs that read what a run has left: `ptft checkpoints`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ptft_dist.checkpoint.checkpoint import Checkpoints, OneProcess
from ptft_dist.cli.checkpoints import checkpoints as command
from ptft_dist.errors import CheckpointError

# --- ptft checkpoints -------------------------------------------------------------------------------------------------

JUDGE = {"metric": "loss", "larger_is_better": False, "rows": "abc"}
# What versions until 0.1 and this version write about the best checkpoint, step 4.
PROGRESS: dict[str, dict[str, Any]] = {
    "0.1": {"best": 0.5, "best_step": 4},
    "now": {
        "best": {"judge": JUDGE, "step": 6, "value": 0.4, "metrics": {"eval/loss": 0.4}},
        "best_checkpoint": {"judge": JUDGE, "step": 4, "value": 0.5, "metrics": {"eval/loss": 0.5}},
    },
}


def committed(run_dir: Path, progress: dict[str, Any], *steps: int) -> None:
    """Checkpoints of 1 MB, of which the newest one alone knows the progress."""
    for step in steps:
        facts = {"kind": "zero2", "world_size": 4, "progress": progress if step == max(steps) else {}}
        Checkpoints(run_dir / "checkpoints").commit(step, write, facts, OneProcess())


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(1_000_000))


@pytest.mark.parametrize("version", PROGRESS)
def test_checkpoints_shows_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str) -> None:
    committed(tmp_path, PROGRESS[version], 2, 4, 6)
    command(tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "step-00000002  zero2 x 4  1.0 MB  good",
        "step-00000004  zero2 x 4  1.0 MB  best  good",
        "step-00000006  zero2 x 4  1.0 MB  good",
    ]


@pytest.mark.parametrize("progress", [{}, {"best_step": None}, {"best": None, "best_checkpoint": None}])
def test_checkpoints_without_a_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: dict[str, Any]
) -> None:
    committed(tmp_path, progress, 2, 4)
    command(tmp_path)
    assert "best" not in capsys.readouterr().out


def test_checkpoints_shows_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The damaged newest checkpoint does not hide which one is the best: the one before it says so too."""
    committed(tmp_path, PROGRESS["now"], 2, 4)
    committed(tmp_path, PROGRESS["now"], 6)
    torn = tmp_path / "checkpoints/step-00000006/manifest.json"
    torn.write_text(torn.read_text()[:100])
    with pytest.raises(CheckpointError, match="1 of 3 checkpoints are damaged"):
        command(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "step-00000004  zero2 x 4  1.0 MB  best  good"
    assert "manifest.json cannot be read" in lines[-1]


def test_checkpoints_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoints holds no checkpoint"):
        command(tmp_path)
