"""The texts of a record: those of its text columns, also inside of conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_IN_A_MESSAGE = ("content", "value")  # of chat messages, and of those in ShareGPT's format


def texts_of(values: Mapping[str, Any], roles: Sequence[str]) -> list[str]:
    """The texts of the columns `roles`, in order. Missing columns and values that are no text are left out."""
    return [text for role in roles if role in values for text in _texts(values[role])]


def with_texts(values: Mapping[str, Any], roles: Sequence[str], change: Callable[[str], str]) -> dict[str, Any]:
    """A copy of the values in which `change` has replaced each text of `texts_of`, called in the same order."""
    changed = {role: _changed(values[role], change) for role in roles if role in values}
    return {role: changed.get(role, value) for role, value in values.items()}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key in _IN_A_MESSAGE:
            if key in value:
                yield from _texts(value[key])


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(item, change) for item in value]
    if isinstance(value, dict):
        inner = {key: _changed(value[key], change) for key in _IN_A_MESSAGE if key in value}
        return {key: inner.get(key, item) for key, item in value.items()}
    return value
