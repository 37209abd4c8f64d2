"""Converts validation errors to messages: the key, the expected value, the given value, and the nearest valid one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache, cached_property
from typing import Any

from pydantic import BaseModel, ValidationError

from ptft_dist.config.document import Document, Mistake
from ptft_dist.config.other_trainers import foreign_name
from ptft_dist.config.secrets import hide
from ptft_dist.config.section import KeyPath, RecipeProblems, dotted

Node = dict[str, Any]  # of a JSON Schema


class Schema:
    """The JSON Schema of a model, with access by the path of a value."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.root: Node = model.model_json_schema()

    def branches(self, node: Node) -> list[Node]:
        """The alternatives of a node, with references resolved."""
        if "$ref" in node:
            return self.branches(self.root["$defs"][node["$ref"].rpartition("/")[2]])
        if "anyOf" in node:
            return [branch for alternative in node["anyOf"] for branch in self.branches(alternative)]
        return [node]

    def child(self, node: Node, key: str | int) -> Node | None:
        """The node of a section's key, or of a list's item; None if there is no such key."""
        for branch in self.branches(node):
            if key in branch.get("properties", {}):
                return branch["properties"][key]
            if isinstance(branch.get("additionalProperties"), dict):
                return branch["additionalProperties"]
            if isinstance(key, int) and key < len(branch.get("prefixItems", ())):
                return branch["prefixItems"][key]
            if isinstance(key, int) and "items" in branch:
                return branch["items"]
        return None

    def at(self, path: KeyPath) -> Node | None:
        """The node at a path; None if there is no such path."""
        node: Node | None = self.root
        for key in path:
            node = self.child(node, key) if node is not None else None
        return node

    def keys(self, node: Node | None) -> list[str]:
        """The keys of a section."""
        return [key for branch in (self.branches(node) if node else ()) for key in branch.get("properties", {})]

    @cached_property
    def all_keys(self) -> list[KeyPath]:
        """The paths of all keys of all sections. List indices are not part of these paths."""
        return list(self._below(self.root, ()))

    def in_first_item(self, path: KeyPath) -> KeyPath:
        """A path of `all_keys` with the index 0 of each list that it leads through, as in data.train.0.path."""
        node: Node | None = self.root
        walked: KeyPath = ()
        for key in path:
            if key not in self.keys(node):
                walked, node = (*walked, 0), self.child(node, 0) if node is not None else None
            walked, node = (*walked, key), self.child(node, key) if node is not None else None
        return walked

    def _below(self, node: Node, path: KeyPath) -> Iterator[KeyPath]:
        for branch in self.branches(node):
            if "items" in branch:
                yield from self._below(branch["items"], path)
            for key, inner in branch.get("properties", {}).items():
                yield (*path, key)
                yield from self._below(inner, (*path, key))

    def expectation(self, node: Node) -> str:
        """What a node accepts, as the object of "expected ...". Null is mentioned only if nothing else is accepted."""
        branches = [branch for branch in self.branches(node) if branch.get("type") != "null"]
        return " or ".join(dict.fromkeys(map(_expectation, branches))) or "null"


@cache
def schema_of(model: type[BaseModel]) -> Schema:
    """The schema of a model. It takes a tenth of a second."""
    return Schema(model)


def _expectation(node: Node) -> str:
    if choices := _choices(node):
        return f"one of {', '.join(choices)}" if len(choices) > 1 else choices[0]
    kind = node.get("type")
    if kind in ("integer", "number"):
        name = "a whole number" if kind == "integer" else "a number"
        words = {
            "minimum": "of at least",
            "exclusiveMinimum": "above",
            "maximum": "at most",
            "exclusiveMaximum": "below",
        }
        bounds = " and ".join(f"{words[bound]} {_number(node[bound])}" for bound in words if bound in node)
        return f"{name} {bounds}".rstrip()
    if kind == "array":
        fixed, least = len(node.get("prefixItems", ())), node.get("minItems", 0)
        if fixed:
            return f"a list of {_items(fixed)}"
        return f"a list of at least {_items(least)}" if least else "a list"
    names = {"boolean": "true or false", "string": "text", "object": "a section (key: value)"}
    return names.get(str(kind), "another value")


def _choices(node: Node) -> list[str]:
    return [str(choice) for choice in node.get("enum", [node["const"]] if "const" in node else [])]


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _items(count: int) -> str:
    return f"{count} item" if count == 1 else f"{count} items"


def _shown(value: Any) -> str:
    """The given value as text. Lists and sections are not quoted, because they may contain secrets."""
    if isinstance(value, dict):
        return "a section (key: value)"
    if isinstance(value, list):
        return f"a list of {_items(len(value))}" if value else "an empty list"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if len(repr(value)) <= 80 else repr(value)[:80] + "..."


def explain(invalid: ValidationError, document: Document, schema: Schema) -> Iterator[Mistake]:
    """One mistake per error, without errors in values that are already reported."""
    reported = {mistake.path for mistake in document.mistakes if mistake.path}
    details = [(detail, *_locate(detail["loc"], detail["type"], document.values)) for detail in invalid.errors()]
    paths = {path for _, path, _ in details}
    seen: set[tuple[KeyPath, str]] = set()
    for detail, path, in_union in details:
        if detail["type"] == "default_factory_not_called":
            continue  # the default depends on another section, whose errors are reported
        if isinstance(error := detail.get("ctx", {}).get("error"), RecipeProblems):
            yield from (Mistake(at, document.line(at), hide(text)) for at, text in error.problems)
            continue
        if in_union and any(len(other) > len(path) and other[: len(path)] == path for other in paths):
            continue  # another alternative of the union matched more of the value: its errors are more helpful
        if any(path[:length] in reported for length in range(1, len(path) + 1)):
            continue
        path, text = _sentence(detail, path, document, schema)
        if (path, text) not in seen:
            seen.add((path, text))
            yield Mistake(path, document.line(path), text)


def _locate(loc: tuple[str | int, ...], kind: str, values: Any) -> tuple[KeyPath, bool]:
    """The path in the values, and whether pydantic's `loc` contained names of union alternatives, which are removed."""
    path: list[str | int] = []
    in_union = False
    for position, key in enumerate(loc):
        is_key = isinstance(values, dict) and key in values
        is_item = isinstance(values, list) and isinstance(key, int) and key < len(values)
        if is_key or is_item:
            values = values[key]
        elif not (kind == "missing" and position == len(loc) - 1):
            in_union = True
            continue
        path.append(key)
    return tuple(path), in_union


def _sentence(detail: Any, path: KeyPath, document: Document, schema: Schema) -> tuple[KeyPath, str]:
    """The path to report, and the message."""
    error_type = detail["type"]
    if error_type == "extra_forbidden":
        return path, _unknown_key(path, document, schema)
    if error_type == "missing" and isinstance(path[-1], str):
        return path, "required, but not given"
    if error_type == "value_error":
        return _from_validator(str(detail["ctx"]["error"]), path, document)
    value = detail["input"]
    if error_type == "missing":  # an item of a list of fixed length
        path = path[:-1]
    node = schema.at(path)
    if node is None:
        return path, hide(detail["msg"])
    expected = schema.expectation(node)
    written = document.written.get(path)
    if written:
        return path, f"expected {expected}, got the text of {written.text} (the value of a reference is always text)"
    hint = _hint(value, schema.branches(node))
    if len(path) == 1 and not isinstance(value, dict | list | None) and (foreign := _foreign(path, document, schema)):
        hint = f"; {foreign}"
    return path, f"expected {expected}, got {_shown(value)}{hint}"


def _hint(value: Any, branches: list[Node]) -> str:
    """A suggestion to append to the message, or an empty text."""
    types = {branch.get("type") for branch in branches}
    if isinstance(value, str):
        near = get_close_matches(value, [choice for branch in branches for choice in _choices(branch)], n=1)
        if near:
            return f"; did you mean {near[0]}?"
        if types & {"integer", "number"} and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value.lower()):
            return "; remove the quotes to make it a number"
    if isinstance(value, int | float) and "string" in types and not any(map(_choices, branches)):
        return "; quote it to make it text"
    return ""


def _unknown_key(path: KeyPath, document: Document, schema: Schema) -> str:
    section, key = path[:-1], str(path[-1])
    if text := _foreign(path, document, schema):
        return f"unknown key; {text}"
    siblings = schema.keys(schema.at(section))
    near = [dotted((*section, name)) for name in get_close_matches(key, siblings, n=1)]
    same_name = [other for other in schema.all_keys if other[-1] == key]
    outermost = [dotted(schema.in_first_item(other)) for other in same_name if len(other) == min(map(len, same_name))]
    hints = list(dict.fromkeys(near + outermost))[:3]
    if hints:
        return f"unknown key; did you mean {' or '.join(hints)}?"
    if text := _foreign(path, document, schema, typos=True):
        return f"unknown key; {text}"
    return f"unknown key; the keys of {dotted(section) or 'this file'} are {', '.join(siblings)}"


def _foreign(path: KeyPath, document: Document, schema: Schema, *, typos: bool = False) -> str:
    """What a name of another trainer is called in a recipe; empty if it is none, or the file is no recipe."""
    tasks = [choice for branch in schema.branches(schema.at(("task",)) or {}) for choice in _choices(branch)]
    found = foreign_name(str(path[-1]), typos=typos) if tasks else None
    if found is None:
        return ""
    task = document.values.get("task")
    keys = found.keys_for(task, tasks)
    keys = tuple(key for key in keys if len(path) > 1 and key.partition(".")[0] == path[0]) or keys
    if keys:
        keys = tuple(dotted(schema.in_first_item(tuple(key.split(".")))) for key in keys)
        return f"did you mean {' or '.join(keys)}? {found.note}".rstrip()
    if found.keys:
        return f"task {task} has no such setting, only other tasks: {', '.join(found.keys)}"
    return f"there is no counterpart. {found.note}"


def _from_validator(text: str, path: KeyPath, document: Document) -> tuple[KeyPath, str]:
    """The path and message of a validator's error. A key at the beginning of the message becomes part of the path."""
    text = hide(text)
    name = re.match(r"(?P<key>[\w.]+):? ", text)
    if name:
        inner = (*path, *name["key"].split("."))
        if inner in document.lines:
            return inner, text[name.end() :]
    return path, text
