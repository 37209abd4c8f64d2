"""Tests that need a GPU; skipped with a reason if there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import train_rows, write_recipe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


def run(tmp_path: Path, documents: Path, cache: Path, name: str, *words: str, **changes: Any) -> Path:
    recipe = write_recipe(tmp_path / f"recipe-{name}", documents, **changes)
    train(tmp_path, cache, str(recipe), f"run_dir={name}", *words)
    return tmp_path / name


def train(folder: Path, cache: Path, *words: str) -> None:
    command = [sys.executable, "-m", "ptft_dist", "train", *words]
    env = {**os.environ, "PTFT_CACHE": str(cache)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in train_rows(run_dir)]


def test_precisions_agree_and_the_device_is_used(tmp_path: Path, documents: Path, cache: Path) -> None:
    runs = {p: run(tmp_path, documents, cache, p, train={"precision": p}) for p in ("fp32", "bf16", "fp16")}
    for precision, run_dir in runs.items():
        device = json.loads((run_dir / "environment.json").read_text())["device"]
        assert device == torch.cuda.get_device_name()
        assert losses(run_dir) == pytest.approx(losses(runs["fp32"]), rel=1e-6 if precision == "fp32" else 0.02)


def test_the_fused_head_gives_the_losses_of_logits(tmp_path: Path, documents: Path, cache: Path) -> None:
    heads = [run(tmp_path, documents, cache, head, clm={"head": head}) for head in ("logits", "fused")]
    assert losses(heads[1]) == pytest.approx(losses(heads[0]), rel=1e-4)


@pytest.mark.parametrize("launch", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_zero_on_one_gpu_gives_the_losses_of_one_process(
    launch: str, tmp_path: Path, documents: Path, cache: Path
) -> None:
    alone = losses(run(tmp_path, documents, cache, "alone"))
    sharded = run(tmp_path, documents, cache, launch, "--launch", launch, "--processes", "1")
    assert json.loads((sharded / "environment.json").read_text())["kind"] == launch.removesuffix("_offload")
    assert losses(sharded) == pytest.approx(alone, rel=1e-4)


def test_an_offloaded_reference_gives_the_same_losses(tmp_path: Path, documents: Path, cache: Path) -> None:
    """Of DPO, whose reference is a second network."""
    start = str(run(tmp_path, documents, cache, "start") / "model")
    rows = [{"prompt": f"prompt {i}", "chosen": f"yes {i}", "rejected": f"no {i} no"} for i in range(64)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = {}
    for offload in (False, True):
        recipe = {
            "task": "dpo",
            "model": {"path": start},
            "data": {"train": [{"path": "pairs.jsonl"}], "max_length": 64},
            "dpo": {"reference": "network"},
            "batch": {"global_size": 8, "micro_size": 4},
            "train": {"max_steps": 4, "offload_frozen": offload},
            "log": {"every": 1},
            "run_dir": f"offload-{offload}",
        }
        (tmp_path / "dpo.yaml").write_text(json.dumps(recipe))
        train(tmp_path, cache, "dpo.yaml")
        seen[offload] = losses(tmp_path / f"offload-{offload}")
    assert seen[True] == pytest.approx(seen[False], rel=1e-6)
