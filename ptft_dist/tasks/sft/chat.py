"""Converts rows for supervised fine-tuning to conversations or plain texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptft_dist.data.columns import PLACEHOLDER, as_fields, proposed
from ptft_dist.data.formats import text_problem
from ptft_dist.data.row_encoder import RowError, require, require_list, require_text
from ptft_dist.tasks.common.chat import ANSWERING, Conversation, Message, Plain, as_message, from_sharegpt, tools_of

SHAPES = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
"""Shape -> its required columns, for those that are recognized by their columns."""
SINGLE_TURN = "single_turn"
_LEARNED = ("weight", "train", "training", "loss")
"""The keys with which messages of other programs say whether they are learned: OpenAI, axolotl, ms-swift."""
REQUIRED = {**SHAPES, SINGLE_TURN: ("prompt", "completion")}
"""Shape -> its required columns."""


def shape_of(values: Mapping[str, Any]) -> str:
    """The shape that a row's columns have.

    Raises:
        RowError: no shape fits the columns, or several do.
    """
    fitting = [shape for shape, columns in SHAPES.items() if all(values.get(column) is not None for column in columns)]
    if len(fitting) == 1:
        return fitting[0]
    has = ", ".join(map(repr, values)) or "none"
    if fitting:
        raise RowError(f"the columns ({has}) fit several shapes: {', '.join(fitting)}. Choose one with sft.shape.")
    _, why, remedy = _nearest_shape(values)
    raise RowError(f"the columns ({has}) fit no known shape ({why}). {remedy}.")


def check_shape(values: Mapping[str, Any], shape: str) -> None:
    """Raises RowError, with a shape that fits better, if a row has none of the columns of sft.shape."""
    if shape not in REQUIRED or any(column in values for column in REQUIRED[shape]):
        return
    better = [other for other, columns in SHAPES.items() if all(values.get(column) is not None for column in columns)]
    nearest, _, remedy = _nearest_shape(values)
    has = ", ".join(map(repr, values)) or "none"
    what = f"Set sft.shape: {better[0]}" if better else remedy + f", and set sft.shape: {nearest}" * (nearest != shape)
    raise RowError(f"the columns ({has}) do not fit sft.shape: {shape} ({', '.join(REQUIRED[shape])}). {what}.")


def _nearest_shape(values: Mapping[str, Any]) -> tuple[str, str, str]:
    """The shape that needs the fewest columns more, why a row does not have it, and the remedy: a mapping."""
    for shape, columns in SHAPES.items():
        absent = [column for column in columns if values.get(column) is None]
        if len(absent) == len(columns):
            continue
        if null := [column for column in absent if column in values]:
            return shape, f"{shape}: {' and '.join(null)} is null", "Fill it in, or remove the row"
        free = [column for column in values if column not in columns]
        return shape, f"{shape} also needs {', '.join(absent)}", f"Map it with {as_fields(proposed(absent, free))}"
    for column, value in values.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and value[0].keys() & {"role", "from"}:
            role = "messages" if "role" in value[0] else "conversations"
            shape = "messages" if role == "messages" else "sharegpt"
            return shape, f"{role} is named otherwise", f"Map it with {as_fields({role: column})}"
    mapping = proposed(SHAPES["alpaca"], list(values))
    if "context" in values and "input" not in values:
        mapping |= {"input": "context"}
    if PLACEHOLDER not in mapping.values():
        return "alpaca", "the nearest is alpaca: instruction, output", f"Map them with {as_fields(mapping)}"
    shapes = "; ".join(f"{shape}: {', '.join(columns)}" for shape, columns in SHAPES.items())
    return "alpaca", shapes, f"Map them, such as with {as_fields(mapping)}"


def read_row(
    values: Mapping[str, Any], shape: str, system: str | None, loss: str = "assistant"
) -> Conversation | Plain:
    """A row as messages or plain text.

    Args:
        system: the system message for conversations without one.
        loss: sft.loss.

    Raises:
        RowError: the row does not have this shape, or contains nothing to learn.
    """
    if shape == "text":
        return Plain("", require_text(values, "text"))
    if shape == "prompt_completion" and isinstance(values.get("prompt"), str):
        return Plain(require_text(values, "prompt", empty=True), require_text(values, "completion"))
    for column in ("messages", "conversations", "completion"):
        _check_learned(values.get(column), loss)
    given = 0
    if shape == "messages":
        messages = [as_message(m, i) for i, m in enumerate(require_list(values, "messages"))]
    elif shape == "sharegpt":
        messages = [from_sharegpt(m, i) for i, m in enumerate(require_list(values, "conversations"))]
    elif shape == "alpaca":
        messages = _from_alpaca(values)
    elif shape == SINGLE_TURN:
        messages = [
            {"role": "user", "content": require_text(values, "prompt")},
            {"role": "assistant", "content": require_text(values, "completion")},
        ]
    else:
        before = [as_message(m, i) for i, m in enumerate(require_list(values, "prompt"))]
        messages = before + [as_message(m, i) for i, m in enumerate(require_list(values, "completion"), len(before))]
        given = len(before)
    own = values.get("system")
    if own is not None and text_problem("system", own):
        raise RowError(str(text_problem("system", own)))
    if (own or system) and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": own or system})
        given += given > 0
    return _complete(messages, tools_of(values), given)


def _check_learned(messages: Any, loss: str) -> None:
    """Raises RowError if a message says that it is not learned, and sft.loss learns it."""
    turns = [each if isinstance(each, dict) else {} for each in messages] if isinstance(messages, list) else []
    answers = [i for i, turn in enumerate(turns) if (turn.get("role") or turn.get("from")) in ANSWERING]
    last = answers[-1] if answers else -1
    learned = {"assistant": answers, "last": [last], "all": range(last + 1)}[loss]
    for i, turn in enumerate(turns):
        for key in _LEARNED if i in learned else ():
            if turn.get(key) in (0, False):
                raise RowError(
                    f"message {i + 1} is not to be learned ({key}: {turn[key]}), and sft.loss: {loss} learns it. "
                    "Remove the key; or end the row with the answer to learn, and set sft.loss: last."
                )


def with_answer(values: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The row with this text as its last answer, instead of its own.

    Raises:
        RowError: the row has neither messages, nor an instruction, nor a prompt; or no message to answer.
    """
    filled = dict(values)
    for column, role, content, speakers in (
        ("messages", "role", "content", ("assistant",)),
        ("conversations", "from", "value", ANSWERING),
    ):
        if isinstance(messages := values.get(column), list):
            asked = list(messages)
            while asked and isinstance(asked[-1], dict) and asked[-1].get(role) in speakers:
                asked.pop()
            if not asked:
                raise RowError(f"{column} has no message to answer. Begin with one of another role than {speakers[0]}.")
            filled[column] = [*asked, {role: speakers[0], content: text}]
            return filled
    if values.get("instruction") is not None:
        return {**filled, "output": text}
    if values.get("prompt") is not None:
        is_text = isinstance(values["prompt"], str)
        return {**filled, "completion": text if is_text else [{"role": "assistant", "content": text}]}
    raise RowError("there are no messages, no instruction and no prompt to answer. Map a column with fields.")


def _complete(messages: list[Message], tools: list[Any] | None, given: int) -> Conversation:
    """The conversation, truncated after its last assistant message.

    Raises:
        RowError: there is no assistant message after the prompt.
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= given]
    if not answers:
        raise RowError("there is no assistant message, so there is nothing to learn. Add one, or remove the row.")
    kept = messages[: answers[-1] + 1]
    return Conversation(kept, tools, given, len(messages) - len(kept))


def _from_alpaca(values: Mapping[str, Any]) -> list[Message]:
    if values.get("history"):
        raise RowError("the field 'history' has earlier turns, which sft.shape: alpaca does not read. Write messages.")
    instruction = require_text(values, "instruction")
    if values.get("input") is not None and (extra := require_text(values, "input", empty=True)).strip():
        instruction = f"{instruction}\n\n{extra}"
    answer = require(values, "output")
    if problem := text_problem("output", answer):
        raise RowError(problem)
    if not answer.strip():
        raise RowError("the field 'output' is empty, so there is nothing to learn. Fill it in, or remove the row.")
    return [{"role": "user", "content": instruction}, {"role": "assistant", "content": answer}]
