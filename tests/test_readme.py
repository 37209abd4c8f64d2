"""README.md and README.zh-CN.md have the same content, and links of all pages lead to files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_commands import blocks, commands
from ruamel.yaml import YAML
from support import ROOT

import ptft_dist
from ptft_dist.api import load_recipe
from ptft_dist.config.resolve import batch_shape
from ptft_dist.tasks.registry import TASKS

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
LINK = re.compile(r"\]\(([^)\s]+)\)")
PAGES = [*ROOT.glob("*.md"), ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def outline(page: Path) -> list[int]:
    """The level of each heading."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]


def test_both_languages_have_the_same_content() -> None:
    assert outline(ENGLISH) == outline(CHINESE)
    each = [[list(commands(block.text)) for block in blocks(page) if block.kind == "sh"] for page in (ENGLISH, CHINESE)]
    assert each[0] == each[1]
    assert sum(map(len, each[0])) > 4
    links = [LINK.findall(page.read_text()) for page in (ENGLISH, CHINESE)]
    assert links[0] == links[1]
    rows = [
        [line.count("|") for line in page.read_text().splitlines() if line.startswith("|")]
        for page in (ENGLISH, CHINESE)
    ]
    assert rows[0] == rows[1]


def test_every_task_that_is_trained_is_listed() -> None:
    named = set(re.findall(r"`(\w+)`", ENGLISH.read_text().split("## What it trains")[1].split("\n\n")[1]))
    assert named == {name for name, spec in TASKS.items() if spec.settings.trains}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    """Anchors are checked when the site is built, see test_site.py."""
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", page.read_text())):
        target = link.partition("#")[0]
        if target and not re.match(r"[a-z]+:", link):
            assert (page.parent / target).exists(), f"{page}: {link}"


def test_files_for_github_can_be_read() -> None:
    load = YAML(typ="safe").load
    forms = [load(path) for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))]
    assert [form["name"] for form in forms if "body" in form] == ["Bug", "Page or message", "Feature"]
    for form in forms:
        for field in form.get("body", ()):
            assert field["attributes"]["label"]
            assert field["type"] in ("textarea", "input", "dropdown", "markdown", "checkboxes")
    citation, hooks = load(ROOT / "CITATION.cff"), load(ROOT / ".pre-commit-config.yaml")
    assert citation["version"] == ptft_dist.__version__
    assert citation["license"] == "Apache-2.0"
    assert {"ruff", "ruff-format", "mypy"} <= {hook["id"] for hook in hooks["repos"][0]["hooks"]}
    assert (ROOT / "CHANGELOG.md").read_text().count(ptft_dist.__version__) == 1


def test_batches_of_several_processes_can_be_divided() -> None:
    """Commands with --processes or --nodes, of shipped recipes or copies of them."""
    checked = []
    for page in PAGES:
        for block in blocks(page):
            for words in commands(block.text) if block.kind == "sh" else ():
                if words[0] != "ptft" or words[1] not in ("train", "submit") or not (ROOT / recipe_of(words)).is_file():
                    continue
                given = {name: int(words[words.index(name) + 1]) for name in SIZES if name in words}
                total = given.get("--processes", given.get("--nodes", 1) * given.get("--gpus-per-node", 1))
                overrides = [word for word in words[3:] if re.match(r"[a-z_.]+=", word)]
                loaded = load_recipe(str(ROOT / recipe_of(words)), overrides, training=True)
                batch_shape(loaded.recipe, total)  # raises RecipeError
                checked.append(total)
    assert sum(total > 1 for total in checked) >= 6


SIZES = ("--processes", "--nodes", "--gpus-per-node")


def recipe_of(words: list[str]) -> str:
    return f"recipes/{Path(words[2]).stem}.yaml" if len(words) > 2 else ""
