"""Every shipped recipe runs unchanged except for its size, on two processes; new recipes are included."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT, eval_rows, start, train_rows

from ptft_dist.tasks.registry import TASKS

TASK = re.compile(r"^task: (\w+)$", re.MULTILINE)
EVERY = sorted((ROOT / "recipes").rglob("*.yaml"))
EVALUATED = [path for path in EVERY if not TASKS[TASK.findall(path.read_text())[0]].settings.trains]
RECIPES = [path for path in EVERY if path not in EVALUATED]
NEEDS = re.compile(r"^# First run: ptft train (\w+)$", re.MULTILINE)  # a recipe that must have run before
SMOKE = ["train.max_steps=2", "eval.every=2", "eval.max_rows=8", "save.every=2", "data.train.0.limit=40"]
SMOKE += ["data.validation=0.2", "batch.global_size=8", "batch.micro_size=4"]
SMALLER = {  # what a recipe says -> overrides that make it cheaper
    r"^task: (?:ppo|grpo|rloo)$": ["{task}.prompts=8", "{task}.sampling.max_new_tokens=4"],
    r"^  generation: ": ["{task}.generation.max_new_tokens=4"],
    r"^  mixing:": ["data.train.1.limit=40"],
    r"^  ewc:$": ["continual.ewc.data.0.limit=20", "continual.ewc.rows=8"],
}


def smaller(recipe: str) -> list[str]:
    """The overrides with which this recipe is tried."""
    (task,) = TASK.findall(recipe)
    found = [words for sign, words in SMALLER.items() if re.search(sign, recipe, re.MULTILINE)]
    return SMOKE + [word.format(task=task) for words in found for word in words]


@pytest.fixture(scope="module")
def run_dir_of(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Callable[[Path], Path]:
    """Runs a recipe after those that it needs, each of them once; returns its run directory."""
    folder = tmp_path_factory.mktemp("recipes")

    def provide(recipe: Path) -> Path:
        run_dir, text = folder / "runs" / recipe.stem, recipe.read_text()
        if run_dir.exists():
            return run_dir
        for name in NEEDS.findall(text):
            provide(ROOT / f"recipes/{name}.yaml")
        words = [*smaller(text), f"run_dir=runs/{recipe.stem}"]
        run = start("train", str(recipe), *words, cwd=folder, cache=cache, ranks=2)
        assert run.wait() == 0, run.stderr
        return run_dir

    return provide


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.relative_to(ROOT / "recipes").as_posix())
def test_a_shipped_recipe_runs(path: Path, run_dir_of: Callable[[Path], Path]) -> None:
    run_dir = run_dir_of(path)
    assert len(train_rows(run_dir)) == 2
    assert [row["step"] for row in eval_rows(run_dir)] == [0, 2]
    assert json.loads((run_dir / "result.json").read_text())["status"] == "finished"
    assert any((run_dir / "model" / name).is_file() for name in ("config.json", "adapter_config.json"))


@pytest.mark.parametrize("path", EVALUATED, ids=lambda path: path.relative_to(ROOT / "recipes").as_posix())
def test_a_recipe_that_trains_nothing_is_evaluated(path: Path, run_dir_of: Callable[[Path], Path], cache: Path) -> None:
    """As its first lines say, with a model of another recipe."""
    text = path.read_text()
    (name,) = NEEDS.findall(text)
    run_dir = run_dir_of(ROOT / f"recipes/{name}.yaml")
    words = ("evaluate", f"runs/{name}", str(path), *smaller(text), "--out", "own.json")
    assert f"#   ptft evaluate runs/{name} {path.stem}\n" in text
    done = start(*words, cwd=run_dir.parent.parent, cache=cache, ranks=2)
    assert done.wait() == 0, done.stderr
    result = json.loads((run_dir.parent.parent / "own.json").read_text())
    assert 0 < result["rows"] <= 8
    assert "eval/accuracy" in result["metrics"]
