"""Parses YAML 1.2 text and `key=value` overrides into plain values, with the line of every key.

The parser builds a tree of nodes and no Python objects. So no tag can run code, and each node has its line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.composer import MaxDepthExceededError
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from ptft_dist.config.section import KeyPath, dotted

COMMAND_LINE = 0
"""The line number of values from the command line; lines of files start at 1."""

_TAG = "tag:yaml.org,2002:"
_TEXT = {_TAG + name for name in ("str", "timestamp", "value")}  # dates and a single `=` are read as text
_SCALARS = {_TAG + name for name in ("int", "float", "bool", "null")}
_MAX_DEPTH = 50
_MAX_VALUES = 100_000  # with aliases expanded, because a few nested aliases can expand to billions of values
_LARGEST = 2**63 - 1
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")


class Mistake(NamedTuple):
    """A problem with the value at `path`, reported at `line`."""

    path: KeyPath
    line: int
    text: str


class Written(NamedTuple):
    """A text whose value may be secret, or has an escape: what is shown instead, and its environment variables."""

    text: str
    """The text before references to the environment and escapes were replaced. References to keys are replaced."""
    variables: tuple[str, ...]


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """All leaf values with their paths. Empty lists and mappings are leaves."""
    if not value or not isinstance(value, dict | list):
        yield path, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(inner, (*path, key))


@dataclass
class Document:
    """A recipe before validation. Its methods do not raise for errors in the recipe; they append to `mistakes`."""

    values: Any = None
    lines: dict[KeyPath, int] = field(default_factory=dict)
    written: dict[KeyPath, Written] = field(default_factory=dict)
    """The texts with references to the environment or escapes; see `references.resolve`."""
    mistakes: list[Mistake] = field(default_factory=list)

    def read(self, text: str) -> None:
        """Parse the text of a recipe file."""
        try:
            node = _compose(text)
            self.values = _Builder(self, None).build(node, ()) if node is not None else None
        except _UnreadableError as error:
            self.mistake((), error.line, error.text)

    def override(self, assignment: str) -> None:
        """Set one value from `a.b.c=value`. The value is YAML 1.2; an empty value is null."""
        key, equals, text = assignment.partition("=")
        path: KeyPath = tuple(re.sub(r"\[(\d+)\]", r".\1", key.strip()).split("."))
        if not equals or "" in path:
            self.mistake((), COMMAND_LINE, f"{key!r}: not an override of the form section.key=value")
            return
        try:
            node = _compose(text)
            parent, path = self._container(path)
            for replaced in [other for other in self.lines if other[: len(path)] == path]:
                del self.lines[replaced]
            self.lines[path] = COMMAND_LINE
            parent[path[-1]] = _Builder(self, COMMAND_LINE).build(node, path) if node is not None else None
        except _UnreadableError as error:
            self.mistake((), COMMAND_LINE, f"{key}: {error.text}{error.hint.format(key=key)}")
        except LookupError as error:
            self.mistake((), COMMAND_LINE, f"{key}: {error.args[0]}")

    def check_leaves(self) -> None:
        """Report values that no key accepts: infinite or too large numbers, invalid Unicode, NUL characters."""
        for path, value in leaves(self.values):
            if isinstance(value, float) and not math.isfinite(value):
                self.mistake(path, self.line(path), f"expected a finite number, got {value}")
            elif isinstance(value, int) and abs(value) > _LARGEST:
                self.mistake(path, self.line(path), f"this number is too large: at most {_LARGEST}")
            text = dotted(path) + (value if isinstance(value, str) else "")
            if any("\ud800" <= character <= "\udfff" for character in text):
                self.mistake(path, self.line(path), "this text is not valid Unicode")
            if "\0" in text:
                self.mistake(path, self.line(path), "this text contains a NUL character")

    def line(self, path: KeyPath) -> int:
        """The line of the value at `path`; for a default, the line of the innermost enclosing section."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def mistake(self, path: KeyPath, line: int, text: str) -> None:
        """Note a problem."""
        self.mistakes.append(Mistake(path, line, text))

    def _container(self, path: KeyPath) -> tuple[Any, KeyPath]:
        """The list or section that contains `path`, created if missing, and `path` with list indices as numbers.

        Raises:
            LookupError: `path` leads through a value that is neither a list nor a section.
        """
        if self.values is None:
            self.values = {}
        container, walked = self.values, path[:0]
        for key in path[:-1]:
            walked = (*walked, _own_key(container, key, walked, path))
            inner = container.get(key) if isinstance(container, dict) else container[walked[-1]]
            if inner is None:
                inner = container[walked[-1]] = {}
                self.lines[walked] = COMMAND_LINE
            container = inner
        return container, (*walked, _own_key(container, path[-1], walked, path))


class _UnreadableError(Exception):
    """The text is not valid YAML, or too large. hint: the remedy in an override of `{key}`."""

    def __init__(self, line: int, text: str, hint: str = "") -> None:
        super().__init__(text)
        self.line, self.text, self.hint = line, text, hint


def _compose(text: str) -> Node | None:
    """Parse text into a tree of nodes; None if the text is empty. Raises _UnreadableError."""
    yaml = YAML(typ="safe", pure=True)
    yaml.max_depth = _MAX_DEPTH
    try:
        return yaml.compose(text)
    except MaxDepthExceededError as error:
        line, problem = error.problem_mark.line + 1, f"nested more than {_MAX_DEPTH} levels deep"
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = ", ".join(part for part in (error.context, error.problem) if part)
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problem = f"the character U+{error.character:04X} is not allowed; write it as an escape in double quotes"
    hint = "; put text with special characters into quotes: {key}='\"...\"'"
    raise _UnreadableError(line, f"not valid YAML: {problem}", hint) from None


class _Builder:
    """Converts nodes to plain values, and records their lines in the document."""

    def __init__(self, document: Document, line: int | None) -> None:
        self.document = document
        self.line = line  # if not None, recorded for all values instead of their own lines
        self.scalars = YAML(typ="safe", pure=True).constructor
        self.open: set[int] = set()  # enclosing nodes; an alias to one of them would recurse forever
        self.count = 0

    def build(self, node: Node, path: KeyPath) -> Any:
        if id(node) in self.open:
            return self._refuse(node, path, "an alias may not refer to a value that contains it")
        self.count += 1
        if self.count > _MAX_VALUES:
            text = f"more than {_MAX_VALUES:,} values, with aliases expanded"
            raise _UnreadableError(self._line_of(node), text)
        self.open.add(id(node))
        try:
            return self._build(node, path)
        finally:
            self.open.remove(id(node))

    def _build(self, node: Node, path: KeyPath) -> Any:
        tag = str(node.tag)
        if isinstance(node, MappingNode) and tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, SequenceNode) and tag == _TAG + "seq":
            for index, item in enumerate(node.value):
                self.document.lines[*path, index] = self._line_of(item)
            return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode) and tag in _TEXT:
            return _joined(node.value)
        if isinstance(node, ScalarNode) and tag in _SCALARS:
            try:
                return self.scalars.construct_object(node)
            except (ValueError, KeyError):
                text = node.value if len(node.value) <= 40 else f"{node.value[:40]}..."
                return self._refuse(node, path, f"{text!r} is not a {tag.removeprefix(_TAG)}")
        return self._refuse(node, path, f"the tag {tag.replace(_TAG, '!!')} is not allowed in a recipe")

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, Any]:
        """The values of a mapping. Keys are always text: in `{0: a}` the key is "0"."""
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode) or not key_node.value:
                self._refuse(key_node, path, "a key must be a name")
            elif str(key_node.tag) == _TAG + "merge":
                self._refuse(key_node, path, "merge keys (<<) are not part of YAML 1.2")
            elif (key := _joined(key_node.value)) in values:
                first = self.document.lines[*path, key]
                self._refuse(key_node, (*path, key), f"given twice, first in line {first}")
            else:
                self.document.lines[*path, key] = self._line_of(key_node)
                values[key] = self.build(value_node, (*path, key))
        return values

    def _line_of(self, node: Node) -> int:
        return node.start_mark.line + 1 if self.line is None else self.line

    def _refuse(self, node: Node, path: KeyPath, text: str) -> None:
        self.document.mistakes.append(Mistake(path, self._line_of(node), text))


def _joined(text: str) -> str:
    """The text with surrogate pairs as one character: JSON, which is also YAML, escapes one beyond U+FFFF as a pair."""
    return _PAIR.sub(lambda pair: pair[0].encode("utf-16", "surrogatepass").decode("utf-16"), text)


def get(values: Any, path: KeyPath) -> Any:
    """The value at a path that exists."""
    for key in path:
        values = values[key]
    return values


def put(values: Any, path: KeyPath, value: Any) -> None:
    """Set the value at a path that exists."""
    get(values, path[:-1])[path[-1]] = value


def _own_key(container: Any, key: str | int, path: KeyPath, whole: KeyPath) -> str | int:
    """A key of a section, or the index of a list item as a number. whole: the path that begins with `path` and `key`.

    Raises:
        LookupError: the container is neither a list nor a section, or the list has no such item.
    """
    if isinstance(container, dict):
        return key
    if not isinstance(container, list):
        raise LookupError(f"{dotted(path)} is neither a section nor a list")
    if not str(key).isdecimal():
        raise LookupError(
            f"{dotted(path)} is a list: name an item by its number, as in {dotted((*path, 0, *whole[len(path) :]))}"
        )
    if int(key) >= len(container):
        raise LookupError(
            f"no item {key} in the list {dotted(path)}, which has {len(container)} items (the first is 0)"
        )
    return int(key)
