"""Conversations: lists of {role, content}, with tool calls as in transformers, from messages and ShareGPT turns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ptft_dist.data.cleaning.texts import REASONING
from ptft_dist.data.encoder import RowError
from ptft_dist.data.formats import Record, json_type, text_problem

Message = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}

ANSWERING = tuple(name for name, role in SHAREGPT.items() if role in ("assistant", "function_call"))
"""The speakers of ShareGPT turns that are answers."""

UNTEMPLATED = "with a prompt and a completion joined without the chat template (sft.shape: single_turn uses it)"
"""The note of a row in the data report; `ptft generate` reads it."""


@dataclass(frozen=True)
class Conversation:
    """One conversation."""

    messages: list[Message]
    """{role, content}, as in transformers."""
    tools: list[Any] | None = None
    """JSON schemas of functions."""
    given: int = 0
    """Number of messages at the beginning that belong to the prompt and are not learned."""
    unanswered: int = 0
    """Number of messages that were truncated after the last assistant message."""


@dataclass(frozen=True)
class Plain:
    """A text without a chat template."""

    prompt: str
    """The beginning of the text, which is not learned; may be empty."""
    completion: str


class FileShapes:
    """The shape of each file's first row, which all its rows must share."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}

    def check(self, record: Record, shape: str) -> None:
        """Raises RowError if this row has another shape than the first row of its file."""
        first = self._first.setdefault(re.sub(r"[:#]\d+$", "", record.where), shape)
        if shape != first:
            raise RowError(f"this row has the shape {shape}, but the first row of the file has {first}. Use two files.")


def as_message(message: Any, number: int) -> Message:
    """A validated message: a known role, text content, and checked tool calls. number: index of the message, from 0.

    Raises:
        RowError: the message is invalid.
    """
    where = f"message {number + 1}"
    if not isinstance(message, dict):
        raise RowError(
            f"{where} is {json_type(message)} and not an object with role and content. Correct or remove the row."
        )
    role = message.get("role")
    if role == "developer":
        role = "system"
    if role not in ROLES:
        role_problem = "has no role" if role is None else f"has the role {role!r}"
        raise RowError(f"{where} {role_problem}; known roles are {', '.join(ROLES)}. Correct or remove the row.")
    content = _content(message.get("content"), where)
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise RowError(f"{where}: tool_calls is {json_type(calls)} and not a list. Correct or remove the row.")
    calls = [_call(call, where) for call in calls]
    if calls and role != "assistant":
        raise RowError(
            f"{where}: a {role} message has tool_calls; only assistant messages can. Correct or remove the row."
        )
    if not content.strip() and not calls and role != "tool":
        raise RowError(f"{where} ({role}) is empty. Fill it in, or remove the row.")
    kept = {key: message[key] for key in ("name", "tool_call_id", *REASONING) if message.get(key)}
    for key, value in kept.items():
        if problem := text_problem(key, value):
            raise RowError(f"{where}: {problem}")
    return {"role": role, "content": content, **({"tool_calls": calls} if calls else {}), **kept}


def _content(content: Any, where: str) -> str:
    """The text of a message's content, which is a text or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, list):
        parts = []
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RowError(
                    f"{where} has a part that is not text; only text is supported. Correct or remove the row."
                )
            parts.append(part["text"])
        content = "".join(parts)
    if problem := text_problem("content", content):
        raise RowError(f"{where}: {problem}")
    return content


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(f"{where}: a tool call needs a function with name and arguments. Correct or remove the row.")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = _json(arguments or "{}", f"{where}: the arguments of {function['name']}", many=True)
    kept = {"id": call["id"]} if call.get("id") else {}
    if kept and (problem := text_problem("id", kept["id"])):
        raise RowError(f"{where}: a tool call: {problem}")
    return {**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def from_sharegpt(turn: Any, number: int) -> Message:
    where = f"turn {number + 1}"
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise RowError(f"{where} is not an object with from and value. Correct or remove the row.")
    role = SHAREGPT.get(turn["from"]) if isinstance(turn["from"], str) else None
    if role is None:
        raise RowError(
            f"{where} is from {turn['from']!r}; known roles are {', '.join(SHAREGPT)}. Correct or remove the row."
        )
    if role == "function_call":
        call = _json(turn["value"], f"{where}, a function_call,")
        calls = call if isinstance(call, list) else [call]
        return {"role": "assistant", "content": "", "tool_calls": [_call(each, where) for each in calls]}
    return as_message({"role": role, "content": turn["value"]}, number)


def tools_of(values: Mapping[str, Any]) -> list[Any] | None:
    tools = values.get("tools")
    if isinstance(tools, str):
        tools = _json(tools, "the field 'tools'") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("the field 'tools' is not a list of JSON schemas. Correct or remove the row.")
    return tools


def _json(text: Any, what: str, *, many: bool = False) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        why = "nested too deeply" if isinstance(error, RecursionError) else error
        raise RowError(f"{what} {'are' if many else 'is'} not JSON ({why}). Correct or remove the row.") from None
