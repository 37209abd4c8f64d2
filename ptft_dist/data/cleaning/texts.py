"""The texts of a record: those of its text columns, also inside of conversations.

The content of a message may be a list of text parts, `[{"type": "text", "text": ...}]`. They are one text, as tasks
read them: a step sees what is split between two parts, and does not remove the space between them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

REASONING = ("reasoning_content", "reasoning", "thinking")
"""The keys of a chat message that templates read its reasoning from."""

_IN_A_MESSAGE = ("content", "value", *REASONING)  # of chat messages, and of those in ShareGPT's format


def texts_of(values: Mapping[str, Any], roles: Sequence[str]) -> list[str]:
    """The texts of the columns `roles`, in order. Missing columns and values that are no text are left out."""
    return [text for role in roles if role in values for text in _texts(values[role])]


def with_texts(values: Mapping[str, Any], roles: Sequence[str], change: Callable[[str], str]) -> dict[str, Any]:
    """A copy of the values in which `change` has replaced each text of `texts_of`, called in the same order."""
    changed = {role: _changed(values[role], change) for role in roles if role in values}
    return {role: changed.get(role, value) for role, value in values.items()}


def compared_texts(values: Mapping[str, Any], roles: Sequence[str], others: Sequence[str] = ()) -> list[str]:
    """What makes a record another one than the rest: its texts, and as JSON the tool calls of its messages, and the
    columns `others`."""
    calls = [call for role in roles for call in _tool_calls(values.get(role))]
    more = [*calls, *(values[role] for role in others if role in values)]
    as_json = [json.dumps(each, sort_keys=True, ensure_ascii=False, default=str) for each in more]
    return texts_of(values, roles) + as_json


def record_unit(texts: Sequence[str], separator: str) -> str:
    """The texts of a record as one; empty if all are blank."""
    return separator.join(texts) if any(text.strip() for text in texts) else ""


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif _is_of_parts(value):
        yield _joined(value)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, dict):
        for key in _text_keys(value):
            yield from _texts(value[key])


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if _is_of_parts(value):
        text = _joined(value)
        changed = change(text)
        return value if changed == text else [{**value[0], "text": changed}]
    if isinstance(value, list):
        return [_changed(item, change) for item in value]
    if isinstance(value, dict):
        inner = {key: _changed(value[key], change) for key in _text_keys(value)}
        return {key: inner.get(key, item) for key, item in value.items()}
    return value


def _text_keys(value: Mapping[str, Any]) -> list[str]:
    """The keys of a message, or of a part of its content, that have texts."""
    return [key for key in (*_IN_A_MESSAGE, *(("text",) if _is_part(value) else ())) if key in value]


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "text" and isinstance(value.get("text"), str)


def _is_of_parts(value: Any) -> bool:
    """Whether this is a content of text parts only."""
    return isinstance(value, list) and bool(value) and all(map(_is_part, value))


def _joined(parts: Sequence[Mapping[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)


def _tool_calls(messages: Any) -> Iterator[Any]:
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict) and message.get("tool_calls"):
            yield message["tool_calls"]
