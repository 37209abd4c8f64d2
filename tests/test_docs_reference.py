"""The pages in docs/reference: those that are generated are not stale, and list what runs really write."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import pytest
from reference_pages.metrics import EVERY_UPDATE, IN_EVALUATIONS, OPTIONAL, documented
from reference_pages.pages import FOLDER, pages
from support import start
from tiny import ALL, LLAMA, ROLLING, write_tiny

from ptft_dist.cli import VERBS
from ptft_dist.config.mistakes import Schema
from ptft_dist.config.section import dotted
from ptft_dist.tasks.registry import TASKS, recipe_class


@pytest.mark.parametrize("name", ["recipe.md", "commands.md", "metrics.md"])
def test_a_generated_page_is_not_stale(name: str) -> None:
    assert (FOLDER / name).read_text() == pages()[name], "write it again with: make reference"


def test_every_key_is_on_the_page() -> None:
    """A section that occurs in several places, such as a source, is described once."""
    headings = dict(re.findall(r"^##+ ([\w.]+)\n(.*?)(?=^##|\Z)", (FOLDER / "recipe.md").read_text(), re.M | re.S))
    schema = Schema(recipe_class())
    sections = {".".join(map(str, path[:-1])) for path in schema.all_keys if len(path) > 1}
    for section in sections & headings.keys():
        node = schema.at(tuple(section.split(".")))
        assert all(f"| `{key}` |" in headings[section] for key in schema.keys(node)), section
    shared = sections - headings.keys()
    for section in shared:  # the same keys as those of a section that has a heading
        keys = {dotted(path[-1:]) for path in schema.all_keys if dotted(path[:-1]) == section}
        assert any(all(f"| `{key}` |" in text for key in keys) for text in headings.values()), section


def test_every_verb_is_on_the_page() -> None:
    text = (FOLDER / "commands.md").read_text()
    assert all(f"\n## ptft {name}\n" in text for name, _, _ in VERBS)
    assert "| `--machine-rank` | whole number, at least 0 |  | The rank of this machine, from 0. |" in text


MOE = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
SEVERAL = [{"function": "rewarding:vowels"}, {"function": "rewarding:vowels", "name": "second"}]
REFERENCE = {"kl": 0.1, "epochs": 1, "rewards": SEVERAL}
PRETRAINED = ["model.config=null", "model.path=../clm/run/model", "tokenizer={path: ../clm/run/model}"]
VARIANTS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("clm", {"model": {"config": LLAMA | MOE}}, []),
    ("clm", {}, [*PRETRAINED, "continual={l2_sp: {strength: 0.1}}", "distillation={teacher: ../clm/run/model}"]),
    ("dpo", {"dpo": {"loss": "orpo", "beta": 0.1}}, []),
    ("sft", {"sft": {"generation": {"metrics": ["exact_match", "bleu", "chrf", "rouge"]}}}, []),
    *((task, {task: {**ALL[task][0][task], **REFERENCE}}, PRETRAINED) for task in ROLLING),
]
"""Tiny recipes that, together with those of all tasks, write every metric that needs no GPU."""
NOT_SEEN = {"skipped", "mfu"}
MULTI_LABEL = {f"{score}_micro" for score in ("precision", "recall", "f1")}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> dict[str, tuple[set[str], set[str], set[str]]]:
    """Task -> the names in updates, those in evaluations, and the files of its runs."""
    folder = tmp_path_factory.mktemp("metrics")
    found: dict[str, tuple[set[str], set[str], set[str]]] = {task: (set(), set(), set()) for task in ALL}
    every = [*((task, {}, []) for task in sorted(ALL)), *VARIANTS]  # the first are named after their task
    for number, (task, changes, overrides) in enumerate(every):
        own = folder / (task if number < len(ALL) else str(number))
        write_tiny(own, task, **{"train": {"max_steps": 2}, **changes})
        run = start("train", "recipe.yaml", *overrides, cwd=own, cache=cache)
        assert run.wait() == 0, f"{task}: {run.stderr}"
        update, evaluation, files = found[task]
        for line in (own / "run/metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            (update if "loss" in row else evaluation).update(row)
        files |= {str(path.relative_to(own / "run")) for path in (own / "run").rglob("*") if path.is_file()}
    return found


@pytest.mark.parametrize("task", ALL)
def test_metrics_are_those_of_the_page(task: str, seen: dict[str, Any]) -> None:
    update, evaluation, _ = seen[task]
    update = {re.sub(r"^reward/.*", "reward/NAME", name) for name in update}
    evaluation = {re.sub(r"^eval/reward/.*", "eval/reward/NAME", name) for name in evaluation - {"step"}}
    names = documented(task)
    assert update - OPTIONAL.keys() - NOT_SEEN == {*EVERY_UPDATE, *names.update} - NOT_SEEN
    listed = set(names.evaluation) - (MULTI_LABEL if task == "classification" else set())
    optional = set(IN_EVALUATIONS) if task == "clm" else set()
    assert evaluation == {f"eval/{name}" for name in listed} | optional
    assert (update >= OPTIONAL.keys()) == (task == "clm")


def test_files_are_those_of_the_page(seen: dict[str, Any]) -> None:
    """Every visible file of a run is on the page, and the page has no file that no run could write."""
    text = (FOLDER / "files.md").read_text()
    patterns = [name.replace("-N", "-*") for name in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)]
    written = {name for _, _, files in seen.values() for name in files if not name.startswith(".")}
    assert {name for name in written if not any(fnmatch.fnmatch(name, each) for each in patterns)} == set()
    sources = "\n".join(path.read_text() for path in (FOLDER.parent.parent / "ptft_dist").rglob("*.py"))
    for pattern in patterns:
        if not any(fnmatch.fnmatch(name, pattern) for name in written):
            assert f'"{pattern.partition("/")[0].partition("-*")[0]}' in sources, pattern


def test_prompting_is_the_only_task_without_a_run() -> None:
    assert TASKS.keys() - ALL.keys() == {"prompting"}
