"""Converts preference rows of the common shapes to pairs of conversations or plain texts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ptft_dist.data.encoder import RowError
from ptft_dist.data.formats import json_type, text_problem
from ptft_dist.data.row_encoder import require, require_list, require_text
from ptft_dist.tasks.common.chat import Conversation, Message, Plain, as_message, from_sharegpt, tools_of

_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True)
class Pair:
    """Two texts with the same prompt: `Conversation.given` messages, or `Plain.prompt`."""

    chosen: Conversation | Plain
    rejected: Conversation | Plain
    margin: float
    """By how much the chosen text is better; NaN if the row does not say."""


def shape_of(values: Mapping[str, Any]) -> str:
    """The shape of a row: preference, hh or sharegpt."""
    if values.get("conversations") is not None:
        return "sharegpt"
    if values.get("prompt") is None and all(is_transcript(values.get(side)) for side in ("chosen", "rejected")):
        return "hh"
    return "preference"


def read_pair(values: Mapping[str, Any], shape: str, system: str | None) -> Pair:
    """A row as a pair.

    Args:
        system: the system message for conversations without one.

    Raises:
        RowError: the row does not have this shape, an answer is empty, or both are equal.
    """
    margin = _margin(values)
    if shape == "preference" and isinstance(require(values, "chosen"), str):
        return Pair(*_plain(values), margin)
    prompt, chosen, rejected = _messages(values, shape)
    for side, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1:] and messages[-1]["role"] != "assistant":
            raise RowError(f"{side}: the last message is from the {messages[-1]['role']}. End with the assistant's.")
        if not messages:
            raise RowError(f"{side}: there is no answer. Add one, or remove the row.")
    if chosen == rejected:
        raise RowError("chosen and rejected are identical. Correct or remove the row.")
    if prompt or chosen[0]["role"] != "system":
        prompt = with_system(prompt, values, system)
    tools = tools_of(values)
    return Pair(
        Conversation([*prompt, *chosen], tools, len(prompt)),
        Conversation([*prompt, *rejected], tools, len(prompt)),
        margin,
    )


def with_system(messages: list[Message], values: Mapping[str, Any], system: str | None) -> list[Message]:
    """The messages, after the row's system message, or else `system`, unless they begin with one. Raises RowError."""
    own = values.get("system")
    if own is not None and (problem := text_problem("system", own)):
        raise RowError(problem)
    if not (own or system) or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": own or system}, *messages]


def common_prefix(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the longest common prefix."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _plain(values: Mapping[str, Any]) -> tuple[Plain, Plain]:
    explicit = values.get("prompt") is not None
    prompt = require_text(values, "prompt", empty=True) if explicit else ""
    chosen, rejected = require_text(values, "chosen"), require_text(values, "rejected")
    if chosen == rejected:
        raise RowError("chosen and rejected are identical. Correct or remove the row.")
    if not explicit:
        shared = _prompt_length(chosen, rejected)
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        for side, text in (("chosen", chosen), ("rejected", rejected)):
            if not text.strip():
                raise RowError(f"{side}: after the common prompt, there is no answer. Correct or remove the row.")
    return Plain(prompt, chosen), Plain(prompt, rejected)


def _messages(values: Mapping[str, Any], shape: str) -> tuple[list[Message], list[Message], list[Message]]:
    """The messages of the prompt and of both answers."""
    if shape == "single_turn":
        prompt, chosen, rejected = (require_text(values, column) for column in ("prompt", "chosen", "rejected"))
        return [_user(prompt)], [_assistant(chosen)], [_assistant(rejected)]
    if shape == "sharegpt":
        turns = require_list(values, "conversations")
        prompt_messages = [from_sharegpt(turn, i) for i, turn in enumerate(turns)]
        return prompt_messages, _answer(values, "chosen", from_sharegpt), _answer(values, "rejected", from_sharegpt)
    if shape == "hh":
        ours, theirs = from_transcript(values, "chosen"), from_transcript(values, "rejected")
    else:
        ours, theirs = _answer(values, "chosen", as_message), _answer(values, "rejected", as_message)
        given = values.get("prompt")
        if isinstance(given, list):
            return [as_message(message, i) for i, message in enumerate(given)], ours, theirs
        if given is not None and ours[:1] and ours[0]["role"] == "assistant":
            return [_user(require_text(values, "prompt"))], ours, theirs
        # A prompt beside whole conversations repeats their first message, as in UltraFeedback.
    shared = _prompt_length(ours, theirs)
    return ours[:shared], ours[shared:], theirs[shared:]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _answer(values: Mapping[str, Any], side: str, convert: Callable[[Any, int], Message]) -> list[Message]:
    """The messages of a side: a list of them, or a single one."""
    value = require(values, side)
    turns = [value] if isinstance(value, dict) else require_list(values, side)
    try:
        return [convert(turn, i) for i, turn in enumerate(turns)]
    except RowError as error:
        raise RowError(f"{side}: {error}") from None


def from_transcript(values: Mapping[str, Any], side: str) -> list[Message]:
    """The messages of a transcript of Human and Assistant."""
    text = require_text(values, side)
    speakers = list(_SPEAKER.finditer(text))
    if not speakers or speakers[0].start() != 0:
        raise RowError(f'{side}: the text does not begin with "Human:". Set the shape preference for plain texts.')
    ends = [speaker.start() for speaker in speakers[1:]] + [len(text)]
    messages = [
        {"role": _ROLES[speaker.group(1)], "content": text[speaker.end() : end].strip()}
        for speaker, end in zip(speakers, ends, strict=True)
    ]
    return _answer({side: messages}, side, as_message)


def is_transcript(text: Any) -> bool:
    return isinstance(text, str) and text.lstrip().startswith("Human:") and "\n\nAssistant:" in text


def _prompt_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the common prompt of two texts or conversations, as TRL's extract_prompt: the longest common prefix
    that leaves something to both, without a space at its end."""
    length = max(0, min(common_prefix(one, other), len(one) - 1, len(other) - 1))
    return length - 1 if length and one[length - 1] == " " else length


def _margin(values: Mapping[str, Any]) -> float:
    margin = values.get("margin")
    if margin is None:
        return math.nan
    try:
        number = math.nan if isinstance(margin, bool) else float(margin)  # the columns of a CSV file are texts
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        what = margin if isinstance(margin, str | float) else json_type(margin)
        raise RowError(f"the margin {what} is not a finite number. Correct or remove the row.")
    return number
