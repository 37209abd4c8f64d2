"""10: retention deletes the best checkpoint; a full disk ends the run and destroys the last good checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support import rows, start, state_digest, write_recipe


def kept(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_the_best_stays_through_a_resume(tmp_path: Path, documents: Path, cache: Path) -> None:
    """The losses of the evaluations are patched: the best one is at update 4, before the resume at update 8."""
    changes: dict[str, Any] = {
        "train": {"max_steps": 12},
        "eval": {"every": 2},
        "save": {"every": 2, "keep": 1, "best": True},
    }
    write_recipe(tmp_path, documents, **changes)
    made = "evaluations:2=3.0:4=1.0:6=2.0:8=2.0:10=1.5:12=1.0"  # at 12 as good as at 4, and not better
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=[made, "raise_in_rank:0:9"])
    assert run.wait() == 1
    assert kept(tmp_path / "run") == ["step-00000004", "step-00000008"]
    best = state_digest(tmp_path / "run/checkpoints/step-00000004")

    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=[made])
    assert run.wait() == 0, run.stderr
    assert kept(tmp_path / "run") == ["step-00000004", "step-00000012"]
    assert state_digest(tmp_path / "run/checkpoints/step-00000004") == best


def test_a_full_disk_takes_nothing(tmp_path: Path, documents: Path, cache: Path, disk: Path) -> None:
    """With keep=1, the checkpoint before the failing save is the only one; it is kept until the next is complete."""
    write_recipe(tmp_path, documents, train={"max_steps": 6}, eval={"every": None}, save={"every": 2, "keep": 1})
    arguments = ("train", "recipe.yaml", "run_dir=disk/run")
    full = ["fill_disk_before_save:4:0", "raise_in_rank:0:6"]
    run = start(*arguments, cwd=tmp_path, cache=cache, patches=full)
    assert run.wait() == 1
    assert "SAVE FAILED at update 4, training continues" in run.stderr
    assert kept(disk / "run") == ["step-00000002"]
    (disk / "filler").unlink()
    run = start(*arguments, cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert "resumed from disk/run/checkpoints/step-00000002" in run.stderr
    assert kept(disk / "run") == ["step-00000006"]
    assert [row["step"] for row in rows(disk / "run") if "loss" in row] == [1, 2, 3, 4, 5, 6]
