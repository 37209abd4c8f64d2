"""Every shipped recipe runs unchanged except for its size, on two processes; new recipes are included."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support import ROOT, eval_rows, start, train_rows

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NEEDS = re.compile(r"^# First run: ptft train (\w+)$", re.MULTILINE)  # a recipe that must have run before
SMOKE = ["train.max_steps=3", "eval.every=3", "eval.max_rows=8", "save.every=3", "data.train.0.limit=40"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT / "recipes").as_posix())
def test_a_shipped_recipe_runs(path: Path, tmp_path: Path, cache: Path) -> None:
    smoke = [*SMOKE, "data.validation=0.2", "batch.global_size=8", "batch.micro_size=2"]
    for name in NEEDS.findall(path.read_text()):
        needed = start("train", name, *smoke, cwd=tmp_path, cache=cache, ranks=2)
        assert needed.wait() == 0, needed.stderr
    smoke.append("run_dir=run")
    smoke += [f"{task}.prompts=8" for task in re.findall(r"^task: (ppo|grpo|rloo)$", path.read_text(), re.MULTILINE)]
    run = start("train", str(path), *smoke, cwd=tmp_path, cache=cache, ranks=2)
    assert run.wait() == 0, run.stderr
    assert len(train_rows(tmp_path / "run")) == 3
    assert [row["step"] for row in eval_rows(tmp_path / "run")] == [0, 3]
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "finished"
    assert any((tmp_path / "run/model" / name).is_file() for name in ("config.json", "adapter_config.json"))
