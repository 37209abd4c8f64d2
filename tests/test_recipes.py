"""Every shipped recipe runs unchanged except for its size, on two processes; new recipes are included."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT, eval_rows, start, train_rows

RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NEEDS = re.compile(r"^# First run: ptft train (\w+)$", re.MULTILINE)  # a recipe that must have run before
TASK = re.compile(r"^task: (\w+)$", re.MULTILINE)
SMOKE = ["train.max_steps=2", "eval.every=2", "eval.max_rows=8", "save.every=2", "data.train.0.limit=40"]
SMOKE += ["data.validation=0.2", "batch.global_size=8", "batch.micro_size=4"]
SMALLER = {  # what a recipe says -> overrides that make it cheaper
    r"^task: (?:ppo|grpo|rloo)$": ["{task}.prompts=8", "{task}.sampling.max_new_tokens=4"],
    r"^  generation: ": ["{task}.generation.max_new_tokens=4"],
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


def test_the_demo_ends_with_a_table_of_what_was_learned(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its stages are small here; each starts from the model of the one before, and PPO from two of them."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    demo = importlib.import_module("demo")

    def train_small(recipe: str, overrides: list[str], run_dir: Path, processes: int) -> None:  # noqa: ARG001
        words = [*smaller((ROOT / f"recipes/{recipe}.yaml").read_text()), f"run_dir={run_dir}"]
        run = start("train", recipe, *overrides, *words, cwd=tmp_path, cache=cache, ranks=1)
        assert run.wait() == 0, run.stderr

    monkeypatch.setattr(demo, "train", train_small)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path)])
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    demo.main()
    table = capsys.readouterr().out.split("stage", 1)[1].splitlines()[1:7]
    after = {line[18:54].strip(): float(line.split()[-1]) for line in table}
    last = {name: eval_rows(tmp_path / name)[-1] for name in ("clm", "sft", "reward", "ppo")}
    assert after.pop("perplexity of source code") == pytest.approx(last["clm"]["eval/perplexity"], rel=1e-3)
    assert after.pop("accuracy on held-out pairs") == pytest.approx(last["reward"]["eval/accuracy"], abs=1e-3)
    assert after.pop("mean reward") == pytest.approx(last["ppo"]["eval/reward"], rel=1e-3)
    assert after.pop("KL divergence from the reference") == pytest.approx(last["ppo"]["eval/kl"], rel=1e-3)
    # The perplexities of the chat model and of the policy, on the same rows.
    assert list(after) == ["perplexity of answers"]
    before = float(table[-1].split()[-2])
    assert before == pytest.approx(last["sft"]["eval/perplexity"], rel=1e-3)
    assert after["perplexity of answers"] != before
