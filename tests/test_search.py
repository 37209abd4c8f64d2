"""Search files: their mistakes, what they draw, and how they fit a recipe."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from tiny import write_tiny

from ptft_dist.config.shipped import shipped
from ptft_dist.errors import RecipeError
from ptft_dist.runs.search import Search, check_search, read_search
from ptft_dist.runs.study import Study


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_tiny(tmp_path, "classification")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(text: str, *overrides: str) -> str:
    Path("search.yaml").write_text(text)
    with pytest.raises(RecipeError) as raised:
        check_search(read_search("search.yaml"), "recipe.yaml", overrides)
    return str(raised.value)


LR = "optim.lr: {log: [1e-5, 1e-2]}"
WRONG = {
    "": "search.yaml:1: the search is empty; its required keys: method, search",
    "- a": "search.yaml:1: a search consists of `key: value` lines",
    "method: [": "search.yaml:1: not valid YAML",
    f"method: tpe\ntrails: 3\nsearch: {{{LR}}}": "search.yaml:2: trails: unknown key; did you mean trials?",
    f"method: tpf\ntrials: 3\nsearch: {{{LR}}}": "search.yaml:1: method: expected one of grid, random, tpe, got 'tpf'",
    f"method: tpe\nsearch: {{{LR}}}": "trials: required with method: tpe",
    f"method: grid\nsearch: {{{LR}}}": "method: grid needs values to list; use choice or int for optim.lr",
    "method: grid\ntrials: 3\nsearch: {optim.lr: {choice: [0.1, 0.2]}}": "trials: the grid has 2 combinations",
    "method: grid\nstartup: 3\nsearch: {optim.lr: {choice: [0.1, 0.2]}}": "startup: has no effect here",
    "method: random\ntrials: 0\nsearch: {}": "search.yaml:2: trials: expected a whole number above 0, got 0",
    "method: random\ntrials: 2\nsearch:\n  optim.lr: {logg: [1, 2]}":
        "search.yaml:4: search.optim.lr.logg: unknown key; did you mean search.optim.lr.log?",
    "method: random\ntrials: 2\nsearch:\n  optim.lr: {log: [0, 2]}": "search.optim.lr.log: needs numbers above 0",
    "method: random\ntrials: 2\nsearch:\n  optim.lr: {uniform: [2, 1]}": "the first number must be below the second",
    "method: random\ntrials: 2\nsearch:\n  optim.lr: {log: [1]}": "search.optim.lr.log: expected a list of 2 items",
    "method: random\ntrials: 2\nsearch:\n  optim.lr: {}": "exactly one of choice, log, uniform, int is needed",
    "method: random\ntrials: 2\nsearch:\n  optim.lr: {choice: [1, 1]}": "a value is given twice",
    "method: random\ntrials: 2\nsearch:\n  optim.lr: {uniform: [1, 2], step: 2}":
        "search.optim.lr.step: has no effect here: it needs int",
    "method: random\ntrials: 2\nsearch:\n  optim.lr: {int: [1, 4], step: 2}": "step: 2 does not lead from 1 to 4",
    f"method: random\ntrials: 2\nsearch: {{{LR}}}\nprune: {{method: hyperband, startup: 2}}":
        "search.yaml:4: prune.startup: has no effect here",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_wrong_search(text: str) -> None:
    assert WRONG[text] in refusal(text)


def test_a_search_that_does_not_fit_the_recipe() -> None:
    """All mistakes together, each at its line."""
    text = "method: random\ntrials: 2\nsearch:\n  optim.lrr: {choice: [1]}\n  run_dir: {choice: [a]}\n"
    text += "  optim.lr: {uniform: [-1, 1]}\n  batch.micro_size: {choice: [3, 5]}\n"
    lines = refusal(text).splitlines()
    assert "search.yaml:5: search.run_dir: a sweep cannot vary this key" in lines
    assert "search.yaml:4: search.optim.lrr: unknown key; did you mean optim.lr?" in lines
    assert "search.yaml:6: search.optim.lr: expected a number above 0, got -1.0" in lines
    lines = refusal("method: random\ntrials: 2\nsearch: {batch.micro_size: {choice: [3, 5]}}").splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("search.yaml: with batch.micro_size=5: recipe.yaml:")
    assert "12 is not a multiple of batch.micro_size (5)" in lines[0]


@pytest.mark.parametrize(
    "key", ["eval", "data.validation.0.path", "data.validation[0].path"], ids=["section", "part", "part in brackets"]
)
def test_what_decides_the_comparison_cannot_be_searched(key: str) -> None:
    text = f'method: random\ntrials: 2\nsearch: {{"{key}": {{choice: [a, b]}}}}'
    assert f"search.yaml:3: search.{key}: a sweep cannot vary this key" in refusal(text)


def test_a_value_that_the_search_replaces_is_refused() -> None:
    text = f"method: random\ntrials: 2\nsearch:\n  {LR}\n  data.train.0: {{choice: [{{path: a.txt}}]}}\n"
    lines = refusal(text, "optim.lr=0.5", "data.train[0].limit=7", "optim.weight_decay=0.2").splitlines()
    says = "has no effect here: every trial has its own value, see search.yaml"
    assert lines == [
        f"command line: optim.lr: {says}:4: search.optim.lr",
        f"command line: data.train[0].limit: {says}:5: search.data.train.0",
    ]


def test_every_combination_of_a_grid_is_tried() -> None:
    grid = "method: grid\nsearch: {batch.global_size: {choice: [12, 20]}, batch.micro_size: {choice: [4, 6]}}"
    assert "search.yaml:2: search.batch.global_size: 20 is not a multiple of batch.micro_size (6)" in refusal(grid)
    random = grid.replace("grid", "random\ntrials: 3")
    Path("search.yaml").write_text(random)
    check_search(read_search("search.yaml"), "recipe.yaml", [])  # 20 and 6 are drawn together only by chance


@pytest.mark.parametrize(
    ("overrides", "more", "says"),
    [
        ((), "metric: f1", "search.yaml: metric: task classification has no metric 'f1'"),
        (("data.validation=",), "", "data.validation: required by a sweep"),
        (("data.validation=", "data.folds=3"), "", "data.folds: a trial of a sweep is one run"),
        (("optim.lrr=1",), "", "command line: optim.lrr: unknown key"),
    ],
)
def test_the_metric_must_exist(overrides: tuple[str, ...], more: str, says: str) -> None:
    if "data.validation=" in overrides:
        overrides += ("eval.every=", "eval.micro_size=")
    assert says in refusal(f"method: random\ntrials: 2\nsearch: {{{LR}}}\n{more}", *overrides)


def test_the_metric_and_its_goal_are_set_in_every_trial() -> None:
    def judged(more: str, *overrides: str) -> tuple[str, bool, list[str]]:
        Path("search.yaml").write_text(f"method: random\ntrials: 2\nsearch: {{{LR}}}\n{more}")
        loaded, given = check_search(read_search("search.yaml"), "recipe.yaml", overrides)
        return loaded.recipe.eval.metric, loaded.recipe.eval.larger_is_better, given

    assert judged("") == ("loss", False, [])
    assert judged("metric: accuracy", "eval.goal=min")[:2] == ("accuracy", True)  # that goal was meant for the loss
    assert judged("metric: loss", "eval.goal=max")[:2] == ("loss", True)
    assert judged("metric: accuracy\ngoal: min")[:2] == ("accuracy", False)
    assert judged("metric: accuracy")[2] == ['eval.metric="accuracy"', "eval.goal=null"]


@pytest.mark.parametrize("path", sorted(shipped("sweeps").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", ["classification", "clm", "sft", "mlm"])
def test_shipped_searches_fit_shipped_recipes(path: Path, recipe: str) -> None:
    check_search(read_search(path.stem), recipe, [])


def test_the_search_in_the_documentation_is_valid() -> None:
    text = (ROOT / "docs/sweep.md").read_text()
    Path("search.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0])
    check_search(read_search("search.yaml"), "classification", [])


# --- draws ------------------------------------------------------------------------------------------------------------


def search(**values: Any) -> Search:
    space = {
        "a": {"log": [1e-4, 1.0]},
        "b": {"uniform": [-1.0, 1.0]},
        "c": {"int": [2, 10], "step": 4},
        "d": {"choice": [None, 1, 1.5, True, "x", [1, 2], {"k": "v"}]},
    }
    return Search.model_validate({"method": "random", "trials": 50, "search": space} | values)


def drawn(folder: Path, wanted: Search, count: int) -> list[dict[str, Any]]:
    study = Study(folder, wanted, larger_is_better=False)
    found = []
    for _ in range(count):
        claim = study.claim()
        assert claim is not None
        found.append(claim.trial.parameters)
        a = claim.trial.parameters["a"]
        study.end(claim.trial.number, "finished", math.log10(a) ** 2, updates=1)  # best at a = 1
        claim.lock.release()
    return found


def test_a_grid_is_the_product(tmp_path: Path) -> None:
    space = {"x": {"choice": [0.1, 0.2]}, "y": {"int": [1, 3]}, "z": {"choice": ["p", None]}}
    wanted = Search.model_validate({"method": "grid", "search": space})
    assert wanted.count == 12
    study = Study(tmp_path, wanted, larger_is_better=True)
    claims = [study.claim() for _ in range(13)]
    naive = [{"x": x, "y": y, "z": z} for x, y, z in itertools.product([0.1, 0.2], [1, 2, 3], ["p", None])]
    assert [claim.trial.parameters for claim in claims if claim] == naive
    assert claims[12] is None


def test_draws_lie_in_their_ranges_and_depend_on_seed_and_number(tmp_path: Path) -> None:
    first = drawn(tmp_path / "0", search(), 40)
    for each in first:
        assert 1e-4 <= each["a"] <= 1
        assert -1 <= each["b"] <= 1
        assert each["c"] in (2, 6, 10)
    assert {json.dumps(each["d"]) for each in first} == {
        json.dumps(value) for value in (None, 1, 1.5, True, "x", [1, 2], {"k": "v"})
    }
    assert {each["c"] for each in first} == {2, 6, 10}
    assert 10 <= sum(each["a"] < 1e-2 for each in first) <= 30  # half of the range by its logarithm
    assert drawn(tmp_path / "1", search(trials=5), 5) == first[:5]
    assert drawn(tmp_path / "2", search(seed=1), 5) != first[:5]


def test_a_study_lies_in_its_directory_whatever_its_name(tmp_path: Path) -> None:
    """SQLAlchemy decodes %20 in a URL, and takes what follows a question mark for options."""
    for name in ("100%20", "a?b=c", "中文 😀#"):
        drawn(tmp_path / name, search(), 1)
        assert (tmp_path / name / "study.db").is_file()


def test_tpe_learns_and_a_reopened_study_draws_the_same(tmp_path: Path) -> None:
    wanted = search(method="tpe", startup=10, trials=24)
    whole = drawn(tmp_path / "whole", wanted, 24)
    assert whole[:10] == drawn(tmp_path / "random", search(), 10)
    near = [sum(abs(math.log10(each["a"])) < 1 for each in part) for part in (whole[:10], whole[14:])]
    assert near[1] >= 7 > near[0] + 2
    parts = [each for count in (7, 9, 8) for each in drawn(tmp_path / "parts", wanted, count)]
    assert parts == whole
