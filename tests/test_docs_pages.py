"""What else the pages say of the program: pieces of recipes have keys of the schema, and functions exist."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML, YAMLError
from support import ROOT

import ptft_dist
from ptft_dist.config.mistakes import Schema
from ptft_dist.tasks.registry import recipe_class

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OTHER = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)


def pieces(text: str) -> Iterator[Mapping[str, Any]]:
    """The pieces of recipes in a page: blocks of YAML whose keys are those of a recipe."""
    for block in [*FENCED.findall(text), *INDENTED.findall(OTHER.sub("", text))]:
        for each in documents(textwrap.dedent(block)):
            if isinstance(each, list) and all(isinstance(item, dict) for item in each):
                each = {"data": {"steps": each}}
            if isinstance(each, dict) and each and each.keys() <= recipe_class().model_fields.keys():
                yield each


def documents(block: str) -> list[Any]:
    """The block as YAML. Alternatives repeat a key in lines of their own."""
    try:
        return [YAML(typ="safe").load(block)]
    except YAMLError:
        lines = [line for line in block.splitlines() if re.match(r"^\w+: *\{", line)]
        return [YAML(typ="safe").load(line) for line in lines]


def leaves(values: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


FREE = ("config", "arguments", "peft")
"""Keys whose values are those of another library."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pieces_of_recipes_have_keys_of_the_schema(page: Path) -> None:
    schema = Schema(recipe_class())
    for piece in pieces(page.read_text()):
        for path in leaves(piece):
            parts = [str(part) for part in path]
            if not any(part in FREE for part in parts[:-1]):
                assert schema.at(path) is not None, f"{page}: {'.'.join(parts)}"


def test_pieces_are_found() -> None:
    found = {page.name: len(list(pieces(page.read_text()))) for page in PAGES}
    assert found["cleaning.md"] == 2 + 8  # two sections, and eight steps
    assert found["continual.md"] == 4
    assert found["adapting.md"] == 3


def test_functions_of_the_python_page_exist() -> None:
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \|", (ROOT / "docs/python.md").read_text(), re.MULTILINE)
    assert len(rows) > 12
    for name, arguments in rows:
        known = inspect.signature(getattr(ptft_dist, name)).parameters
        named = re.findall(r"(?:^|, )(\w+)(?==|,|$)", arguments.replace("load_recipe(recipe)", ""))
        for argument in named:
            positional = argument in ("recipe", "run", "runs", "model", "run_dir", "run_or_model")
            assert positional or argument in known, f"{name}: {argument}"
