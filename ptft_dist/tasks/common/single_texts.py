"""Reads rows of one text each, which a network with a scalar head scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptft_dist.data.encoder import RowError
from ptft_dist.data.row_encoder import require_list, require_text
from ptft_dist.tasks.common.chat import Conversation, Message, Plain, as_message, from_sharegpt, tools_of
from ptft_dist.tasks.common.preference_pairs import from_transcript, is_transcript, with_system


def read_text(values: Mapping[str, Any], shape: str, system: str | None) -> Conversation | Plain:
    """A row as a conversation or a plain text: messages, conversations, prompt and completion, or text.

    Args:
        shape: how pairs were read in training, see PreferenceSettings.shape.
        system: the system message for conversations without one.

    Raises:
        RowError: the row has none of these columns, or its text is empty.
    """
    messages: list[Message]
    if values.get("messages") is not None:
        messages = [as_message(message, i) for i, message in enumerate(require_list(values, "messages"))]
    elif values.get("conversations") is not None:
        messages = [from_sharegpt(turn, i) for i, turn in enumerate(require_list(values, "conversations"))]
    elif isinstance(values.get("completion"), list):
        both = [*require_list(values, "prompt"), *values["completion"]]
        messages = [as_message(message, i) for i, message in enumerate(both)]
    elif values.get("completion") is not None:
        prompt, completion = require_text(values, "prompt", empty=True), require_text(values, "completion")
        if shape != "single_turn":
            return Plain(prompt, completion)
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    elif values.get("text") is not None:
        text = require_text(values, "text")
        if shape == "preference" or not is_transcript(text):
            return Plain("", text)
        messages = from_transcript(values, "text")
    else:
        has = ", ".join(map(repr, values)) or "none"
        raise RowError(
            f"the fields ({has}) are no pair (chosen, rejected) and no text (messages; conversations; prompt and "
            "completion; text). Rename them."
        )
    if not messages:
        raise RowError("there is no message. Add one, or remove the row.")
    return Conversation(with_system(messages, values, system), tools_of(values))
