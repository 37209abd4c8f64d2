"""Checks that the special tokens of a row come from the chat template only.

A text that contains a special token, or forms one together with the text next to it, could end turns and begin others.
There are two checks. First, a text (a message, a key or value of a tool or its arguments) must not contain a special
token. Second, the special tokens of the encoded row must equal those of the same conversation with its texts replaced
by neutral ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from ptft_dist.config.token_ids import id_count
from ptft_dist.data.encoder import RowError
from ptft_dist.tasks.common.chat import Conversation, Plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CACHED_SHAPES = 4096

SCHEMA_KEYS = frozenset(
    {"type", "function", "name", "description", "strict", "parameters", "arguments", "return", "returns", "title"}
    | {"properties", "required", "items", "additionalProperties", "anyOf", "oneOf", "allOf", "$defs", "$ref"}
    | {"enum", "const", "default", "format", "nullable", "minimum", "maximum"}
)
"""Keys of a tool's JSON schema that templates read by name."""
SCHEMA_TYPES = frozenset({"function", "object", "array", "string", "number", "integer", "boolean", "null"})


class ControlTokens:
    """The special tokens of a tokenizer, except UNK."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        longest_first = sorted(special.values(), key=len, reverse=True)
        self.pattern = re.compile("|".join(re.escape(token) for token in longest_first) or r"(?!)")
        self.names = {i: token for i, token in special.items() if i != tokenizer.unk_token_id}
        self._is_control = np.zeros(id_count(tokenizer), bool)
        self._is_control[list(self.names)] = True
        self._expected: dict[str, list[int]] = {}

    def of(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        """The ids of special tokens among `ids`, in order."""
        array = np.asarray(ids, dtype=np.int64)
        return array[self._is_control[array]].tolist()

    def check_texts(self, parsed: Conversation | Plain) -> None:
        """Check that no text of a row contains a special token.

        Raises:
            RowError: a text of the row contains a special token.
        """
        for field, text in fields(parsed):
            if match := self.pattern.search(text):
                raise RowError(
                    f"{field}: the text contains the special token {match.group()!r}. Remove it from the row."
                )

    def check_encoded(
        self,
        parsed: Conversation | Plain,
        ids: Sequence[int] | np.ndarray,
        encode: Callable[[Any], Sequence[int] | np.ndarray],
        *,
        cut: bool,
    ) -> None:
        """Check that an encoded row has exactly the special tokens of the template.

        Args:
            ids: the encoded row.
            encode: encodes a row of the same structure with neutral texts.
            cut: `ids` are only the beginning of the row.

        Raises:
            RowError: the row has an additional special token, or one is missing.
        """
        neutral = neutral_row(parsed)
        key = json.dumps([neutral.messages, neutral.tools] if isinstance(neutral, Conversation) else None)
        if key not in self._expected:
            if len(self._expected) >= _CACHED_SHAPES:
                self._expected.clear()
            self._expected[key] = self.of(encode(neutral))
        expected, actual = self._expected[key], self.of(ids)
        if actual == (expected[: len(actual)] if cut else expected):
            return
        first = next(i for i, (one, other) in enumerate(zip_longest(actual, expected)) if one != other)
        token = self.names[(actual[first:] or expected[first:])[0]]
        raise RowError(
            f"{_sharing(parsed, token)}: together with the text next to it, this text changes the special tokens of "
            f"the row (at {token!r}). Change or remove the row."
        )


def fields(parsed: Conversation | Plain) -> Iterator[tuple[str, str]]:
    """All texts of a row, including the keys of objects: (place, text). A place is, for example,
    `tools[0].function.description`."""
    if isinstance(parsed, Plain):
        yield from (("prompt", parsed.prompt), ("completion" if parsed.prompt else "text", parsed.completion))
        return
    for i, message in enumerate(parsed.messages):
        yield from _texts({key: value for key, value in message.items() if key != "role"}, f"message {i + 1}")
    yield from _texts(parsed.tools, "tools")


def _texts(value: Any, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield f"{place}, key {key!r}", str(key)
            yield from _texts(inner, f"{place}.{key}")
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _texts(inner, f"{place}[{i}]")


def _sharing(parsed: Conversation | Plain, token: str) -> str:
    """The places whose texts begin or end with a part of the token."""
    parts = range(1, len(token))
    sharing = [
        place
        for place, text in fields(parsed)
        if any(text.endswith(token[:n]) or text.startswith(token[n:]) for n in parts) or (text and text in token)
    ]
    return " and ".join(sharing[:4]) or "texts of this row"


def neutral_row(parsed: Conversation | Plain) -> Conversation | Plain:
    """A row of the same structure whose texts cannot form a special token."""
    if isinstance(parsed, Plain):
        return Plain("x" if parsed.prompt else "", "x")
    messages = [_neutral_message(message) for message in parsed.messages]
    return replace(parsed, messages=messages, tools=_neutral_tool(parsed.tools))


def _neutral_message(message: dict[str, Any]) -> dict[str, Any]:
    neutral: dict[str, Any] = {}
    for key, value in message.items():
        if key == "role":
            neutral[key] = value
        elif key == "content":
            neutral[key] = _neutral_text(value)[:1]
        elif key == "tool_calls":
            neutral[key] = [
                {
                    **({"id": _neutral_text(call["id"])} if "id" in call else {}),
                    "type": "function",
                    "function": {
                        "name": _neutral_text(call["function"]["name"]),
                        "arguments": _neutral(call["function"]["arguments"]),
                    },
                }
                for call in value
            ]
        else:
            neutral[key] = _neutral(value)
    return neutral


def _neutral_text(text: str) -> str:
    """A neutral text that keeps what templates test: whether a text is empty or blank, and the length of an id."""
    return "x" * min(len(text), 16) if text.strip() else text[:1]


def _neutral(value: Any) -> Any:
    if isinstance(value, str):
        return _neutral_text(value)
    if isinstance(value, dict):
        return {f"x{i}": _neutral(inner) for i, inner in enumerate(value.values())}
    if isinstance(value, list):
        return [_neutral(inner) for inner in value]
    return value


def _neutral_tool(value: Any) -> Any:
    """Like _neutral, but keeps the keywords of JSON schemas, because templates read them."""
    if isinstance(value, dict):
        return {
            key if key in SCHEMA_KEYS else f"x{i}": inner
            if key == "type" and isinstance(inner, str) and inner in SCHEMA_TYPES
            else _neutral_tool(inner)
            for i, (key, inner) in enumerate(value.items())
        }
    if isinstance(value, list):
        return [_neutral_tool(inner) for inner in value]
    return _neutral_text(value) if isinstance(value, str) else value
