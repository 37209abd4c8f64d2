"""`make gpu-dry`: what `make gpu` does on a card, at toy size on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from preloaded_ranks import preloaded_ptft
from support import ROOT


def test_every_part_runs(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--dry", "--out", str(tmp_path / "out")]
    words += ["--python", str(preloaded_ptft() / "python"), "--parts", "splits", "offload", "speed", "ppo"]
    done = subprocess.run(
        words, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out/gpu.json").read_text())
    what = {part: [row["what"] for row in rows] for part, rows in report["parts"].items()}
    assert what["speed"][-3:] == ["toy, bare loop", "toy, transformers.Trainer", "toy, TRL SFTTrainer"]
    assert all(row["apart"] < 1e-5 for row in report["parts"]["splits"])
    one, sharded = report["parts"]["offload"]
    assert max(abs(a - b) for a, b in zip(one["losses"], sharded["losses"], strict=True)) < 1e-4
    assert [row["what"] for row in report["parts"]["ppo"]] == ["PPO", "PPO with LoRA"]
    page = (tmp_path / "out/gpu.md").read_text()
    assert "these numbers say nothing about a GPU" in page
    assert all(name in page for names in what.values() for name in names)


def test_a_run_that_fails_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--dry", "--out", str(tmp_path), "--parts", "splits"]
    done = subprocess.run([*words, "--python", "/bin/false"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    rows = json.loads((tmp_path / "gpu.json").read_text())["parts"]["splits"]
    assert [row["failed"][:11] for row in rows] == ["exit code 1"] * 2
    assert "**failed**: exit code 1" in (tmp_path / "gpu.md").read_text()
