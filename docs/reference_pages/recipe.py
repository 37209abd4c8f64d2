"""docs/reference/recipe.md: every key of a recipe, from its JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ptft_dist.config.mistakes import Node, Schema
from ptft_dist.config.section import Section
from ptft_dist.tasks.registry import TASKS, recipe_class
from reference_pages.markdown import anchor, sentence, table
from reference_pages.units import unit_of

_HEAD = """# Recipe reference

Every key of a recipe, made from the schema (`make reference`). `ptft config schema` prints the same as JSON Schema, and
`ptft config show RECIPE` prints the values of one recipe with their origins. A unit `-` means a number without one.

The top level has the sections below, `task` and `run_dir`. Only the section of the recipe's own task may be given.
"""


def recipe_page() -> str:
    """The page: one section of it for each section of a recipe."""
    return _HEAD + "\n" + "\n".join(_Page(Schema(recipe_class())).sections())


class _Page:
    def __init__(self, schema: Schema) -> None:
        self.schema = schema
        self.paths: dict[str, str] = {}
        """Name of a definition -> the dotted key under which it is described."""

    def sections(self) -> Iterator[str]:
        """The Markdown of each section: the top level, then depth first."""
        yield from self._section(self.schema.root, "Recipe", "")

    def _section(self, node: Node, name: str, path: str) -> Iterator[str]:
        required = node.get("required", ())
        below: list[tuple[str, str]] = []
        rows = []
        for key, inner in node.get("properties", {}).items():
            inside = f"{path}.{key}" if path else key
            nested = self._definition(inner)
            if nested and nested not in self.paths:
                self.paths[nested] = inside
                below.append((nested, inside))
            if path or not nested:
                rows.append(self._row(name, key, inner, key in required, nested))
        if path:
            level = "##" if "." not in path else "###"
            yield f"{level} {path}\n"
            yield sentence(node.get("description", "").split("\n\n")[0]) + "\n"
        if rows:
            yield table(["key", "type", "default", "unit", "meaning"], rows)
        elif path:
            yield "It has no keys of its own.\n"
        for nested, inside in below:
            yield from self._section(self.schema.root["$defs"][nested], nested, inside)

    def _row(self, section: str, key: str, node: Node, required: bool, nested: str) -> list[str]:
        unit = unit_of(section, key) if self._is_number(node) else ""
        default = "**required**" if required else self._default(section, key, node, nested)
        return [f"`{key}`", self._type(node, nested), default, unit, sentence(node.get("description", ""))]

    def _type(self, node: Node, nested: str) -> str:
        words = self._expectation(node)
        if nested:
            where = self.paths[nested]
            link = f"[{where}](#{anchor(where)})"
            words = words.replace("a section (key: value)", f"section {link}")
            if link not in words:  # a list of sections
                words += f" of {link}"
        return words

    def _expectation(self, node: Node) -> str:
        """What the error messages say of a value, and what is in its lists and tables."""
        branches = self.schema.branches(node)
        if any(set(branch.get("enum", ())) == set(TASKS) for branch in branches):
            return "the name of a [task](../tasks.md)"
        words = [self._branch(branch) for branch in branches if branch.get("type") != "null"]
        return " or ".join(dict.fromkeys(words))

    def _branch(self, branch: Node) -> str:
        words = self.schema.expectation(branch)
        values, items = branch.get("additionalProperties"), branch.get("items")
        if branch.get("type") == "object" and "properties" not in branch:
            return f"table: name -> {self._expectation(values)}" if isinstance(values, dict) and values else "table"
        if items and not self._definition(items):
            return f"{words} ({self._expectation(items)})"
        return words

    def _default(self, section: str, key: str, node: Node, nested: str) -> str:
        if nested and ("default" not in node or isinstance(node["default"], dict)):
            return ""
        value = node["default"] if "default" in node else _made_default(section, key)
        return f"`{json.dumps(value, ensure_ascii=False)}`"

    def _is_number(self, node: Node) -> bool:
        return any(branch.get("type") in ("integer", "number") for branch in self.schema.branches(node))

    def _definition(self, node: Node) -> str:
        """The name of the section that a node is, or has in a list; empty for other values."""
        if "$ref" in node:
            return str(node["$ref"].rpartition("/")[2])
        inner = [*node.get("anyOf", ()), *([node["items"]] if "items" in node else [])]
        return next((name for each in inner if (name := self._definition(each))), "")


def _made_default(section: str, key: str) -> Any:
    """A default that a function makes, which the schema leaves out."""
    classes = [Section]
    for each in classes:
        classes += each.__subclasses__()
    (kind,) = {each for each in classes if each.__name__ == section}
    return kind.model_fields[key].get_default(call_default_factory=True)
