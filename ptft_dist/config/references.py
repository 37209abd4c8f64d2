"""References in texts of a recipe: `${env:NAME}`, `${env:NAME:-default}`, `${section.key}`, and the escape `$${`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from ptft_dist.config import secrets
from ptft_dist.config.document import Document, Written, leaves, put
from ptft_dist.config.section import KeyPath, dotted

_REFERENCE = re.compile(r"\$\$\{|\$\{(?P<body>[^{}]*)\}|\$\{")
_ENVIRONMENT = re.compile(r"env:(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?P<default>:-.*)?", re.DOTALL)
_KEY = re.compile(r"[\w-]+(\.[\w-]+)*")

Default = Callable[[KeyPath], Any]
"""The default of a key that the recipe does not give. Raises LookupError, with the key that was meant, if known."""


def resolve(document: Document, environment: Mapping[str, str], default: Default) -> None:
    """Replace the references in all texts of a recipe. Problems become mistakes of the document.

    A text that consists of one reference to a key gets its value with its type. Otherwise, and from the environment,
    the value is inserted as text.
    """
    if isinstance(document.values, dict):
        resolver = _Resolver(document, environment, default)
        for path, value in list(leaves(document.values)):
            if isinstance(value, str) and "${" in value:
                resolver.of(path, value)
        for path, (value, public) in resolver.done.items():
            put(document.values, path, value)
            if isinstance(public, str) and "${" in public:
                document.written[path] = Written(public, tuple(dict.fromkeys(resolver.variables.get(path, ()))))


class _Resolver:
    """Resolves texts, each once. A value comes with what is shown of it: references to the environment stay as they
    are."""

    def __init__(self, document: Document, environment: Mapping[str, str], default: Default) -> None:
        self.document, self.environment, self.default = document, environment, default
        self.done: dict[KeyPath, tuple[Any, Any]] = {}
        self.variables: dict[KeyPath, list[str]] = {}
        self.open: list[KeyPath] = []

    def of(self, path: KeyPath, text: str) -> tuple[Any, Any]:
        """The value of a text, and what is shown of it."""
        if path not in self.done:
            self.open.append(path)
            whole = _REFERENCE.fullmatch(text)
            if whole and whole["body"] is not None and not whole["body"].startswith("env:"):
                self.done[path] = self._replacement(path, whole)
            else:
                parts = [self._replacement(path, match) for match in _REFERENCE.finditer(text)]
                self.done[path] = (
                    _filled(text, [value for value, _ in parts]),
                    _filled(text, [public for _, public in parts]),
                )
            self.open.pop()
        return self.done[path]

    def _replacement(self, path: KeyPath, match: re.Match[str]) -> tuple[Any, Any]:
        """The value of one reference, and what is shown of it."""
        body = match["body"]
        if match[0] == "$${":
            return "${", "$${"
        try:
            if body is None:
                raise LookupError(
                    "a reference without its closing }, or within another reference; for a literal ${, write $${"
                )
            if reference := _ENVIRONMENT.fullmatch(body):
                return self._variable(path, reference), match[0]
            if not _KEY.fullmatch(body):
                raise LookupError(_unknown(match[0], ""))
            return self._key(match[0], tuple(body.split(".")))
        except LookupError as error:
            self.document.mistake(path, self.document.line(path), str(error.args[0]))
            return match[0], match[0]

    def _variable(self, path: KeyPath, reference: re.Match[str]) -> str:
        """The value of an environment variable. Raises LookupError."""
        name, default = reference["name"], reference["default"]
        self.variables.setdefault(path, []).append(name)
        value = self.environment.get(name)
        if value:
            secrets.remember(value, f"${{env:{name}}}")
        if default is not None:  # as in a shell, `:-` also replaces an empty value
            return value or default[2:]
        if value is None:
            raise LookupError(f"the environment variable {name} is not set; set it, or write ${{env:{name}:-default}}")
        return value

    def _key(self, reference: str, parts: tuple[str, ...]) -> tuple[Any, Any]:
        """The value of another key, and what is shown of it. Raises LookupError."""
        target, value = self._lookup(reference, parts)
        if target in self.open:
            through = [dotted(each) for each in self.open[self.open.index(target) + 1 :]]
            chain = f" through {', '.join(through)}" if through else ""
            raise LookupError(f"{reference} cannot be used here: {dotted(target)} would refer to itself{chain}")
        if isinstance(value, str) and "${" in value:
            return self.of(target, value)
        if value is None or isinstance(value, dict | list):
            what = "null" if value is None else "a list" if isinstance(value, list) else "a section"
            raise LookupError(f"{reference} cannot be used here: {dotted(target)} is {what}, and not one value")
        return value, value

    def _lookup(self, reference: str, parts: tuple[str, ...]) -> tuple[KeyPath, Any]:
        """The path of a key and its value as written, or its default. Raises LookupError."""
        value: Any = self.document.values
        path: KeyPath = ()
        for part in parts:
            key: str | int = int(part) if isinstance(value, list) and part.isdecimal() else part
            path = (*path, key)
            try:
                value = value[key]
            except (LookupError, TypeError):
                return self._default(reference, parts)
        return path, value

    def _default(self, reference: str, parts: tuple[str, ...]) -> tuple[KeyPath, Any]:
        try:
            return parts, self.default(parts)
        except LookupError as error:
            raise LookupError(_unknown(reference, str(error.args[0]) if error.args else "")) from None


def _filled(text: str, parts: list[Any]) -> str:
    """The text with its references replaced, in their order."""
    each = iter(parts)

    def shown(_: re.Match[str]) -> str:
        value = next(each)
        return str(value).lower() if isinstance(value, bool) else str(value)

    return _REFERENCE.sub(shown, text)


def _unknown(reference: str, near: str) -> str:
    if near:
        return f"unknown reference {reference}; did you mean ${{{near}}}?"
    return (
        f"unknown reference {reference}; use ${{env:NAME}}, ${{env:NAME:-default}}, or a key of the recipe, such as "
        "${run_dir} or ${optim.lr}"
    )


def default_of(model: type[BaseModel], known: Callable[[], list[str]]) -> Default:
    """The defaults of a schema. known: the dotted keys of the schema, for suggestions."""

    def find(path: KeyPath) -> Any:
        section: Any = model
        for number, part in enumerate(path):
            is_section = isinstance(section, type) and issubclass(section, BaseModel)
            field = section.model_fields.get(part) if is_section else None
            if field is None or (number == len(path) - 1 and field.is_required()):
                near = get_close_matches(dotted(path), known(), n=1) if field is None else []
                raise LookupError(*near)
            given = field.get_default(call_default_factory=False)
            if number == len(path) - 1:
                return given
            section = type(given) if isinstance(given, BaseModel) else field.annotation
        raise LookupError

    return find
