"""Encodes labelled answers: a prompt with an answer that is desirable or not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ptft_dist.data.encoder import Example, LeftOut, RowError
from ptft_dist.data.example_store import ExampleStore
from ptft_dist.data.formats import Record, json_type, text_problem
from ptft_dist.data.row_encoder import require, require_all, require_list, require_text
from ptft_dist.data.store import Row
from ptft_dist.tasks.common import preference_pairs
from ptft_dist.tasks.common.chat import Conversation, Message, Plain, as_message, tools_of
from ptft_dist.tasks.common.preference_pairs import common_prefix, read_pair
from ptft_dist.tasks.common.preference_rows import PROMPT_TOO_LONG, TOO_LONG, TRUNCATED, PreferenceRows
from ptft_dist.tasks.kto.settings import KtoSettings

if TYPE_CHECKING:
    from tokenizers import Encoding

UNPAIRED = ("unpaired", "messages")
_TRUTH = {"true": True, "false": False, "1": True, "0": False}


class Answer(NamedTuple):
    """A prompt and its answer."""

    text: Conversation | Plain
    desirable: bool


class MismatchedStore(ExampleStore):
    """Rows with the column `other`: the answer of an earlier row with another prompt, for the estimate of the KL.

    As in TRL, it is the answer of the row before, and the first row gets that of the last one. Rows of pairs get the
    answer of the same side of the pair before. Rows with the same prompt are passed over.
    """

    def row(self, i: int) -> Row:
        row, found = super().row(i), super().row(int(self._others[i]))
        other = found.input_ids[int(found.columns["parts"][0]) :]
        return Row(row.input_ids, row.document_starts, {**row.columns, "other": other})

    @cached_property
    def _others(self) -> np.ndarray:
        """For each row the one whose answer it gets; the one before if all have the same prompt: int64 [N]."""
        count = len(self)
        prompts, steps = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for i in range(count):
            row = super().row(i)
            length, steps[i] = row.columns["parts"]
            prompts[i] = hash(row.input_ids[:length].tobytes())
        others = np.zeros(count, np.int64)
        for step in np.unique(steps).tolist():
            before, found = (np.arange(count) - step) % count, np.full(count, -1, np.int64)
            for i in (*range(count), *range(count)):  # twice around, because the first rows follow the last ones
                # Where the row before has the same prompt, its mismatched row is that of this one too.
                found[i] = before[i] if prompts[before[i]] != prompts[i] else found[before[i]]
            own = steps == step
            others[own] = np.where(found < 0, before, found)[own]
        return others


class LabelledAnswerRows(PreferenceRows):
    """Encodes labelled answers, and pairs as two of them. The columns of a row:

    input_ids: prompt and answer.
    parts [2]: number of tokens of the prompt; the distance to the row whose answer may be its mismatched one.
    desirable [1]: 1 if the answer is desirable.
    other: see MismatchedStore.

    The token ids are those of TRL's KTOTrainer.
    """

    columns = {"parts": "<i4", "desirable": "u1"}
    store = MismatchedStore
    settings: KtoSettings

    # --- without a tokenizer -----------------------------------------------------------------------------------------

    @classmethod
    def required(cls, settings: KtoSettings) -> tuple[str, ...]:  # type: ignore[override]
        given = {"auto": (), "unpaired": ("completion", "label"), "messages": ("messages", "label")}
        return given[settings.shape] if settings.shape in given else super().required(settings)

    @classmethod
    def check(cls, settings: KtoSettings, record: Record) -> None:  # type: ignore[override]
        require_all(record.values, cls.required(settings))
        _read(settings, record)

    @classmethod
    def texts(cls, settings: KtoSettings, record: Record) -> Iterator[str]:  # type: ignore[override]
        for number, (text, _) in enumerate(_read(settings, record)):
            if isinstance(text, Plain):
                yield text.completion if number else text.prompt + text.completion
            else:
                messages = text.messages[text.given :] if number else text.messages
                yield from (message["content"] for message in messages if message["content"])

    # --- with the tokenizer ------------------------------------------------------------------------------------------

    def admit(self, record: Record) -> None:
        if self.settings.shape == "auto":
            self._shapes.check(record, _shape_of(record.values))

    def pieces(self, record: Record) -> Sequence[Any]:
        """The prompt and the whole text of each answer, each with whether the tokenizer adds its special tokens."""
        answers, pieces = _read(self.settings, record), []
        for text, _ in answers:
            self.control.check_texts(text)
            plain = isinstance(text, Plain)
            pieces += [(self._prompt(text), plain), (self._text(text), plain)]
        self._answers[id(record)] = answers
        return pieces

    @property
    def _answers(self) -> dict[int, list[Answer]]:
        return self._pairs  # type: ignore[return-value]  # both are passed from `pieces` to `build`

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        answers = self._answers.pop(id(record))
        return [
            self._example(answer, encodings[2 * i].ids, encodings[2 * i + 1].ids, len(answers))
            for i, answer in enumerate(answers)
        ]

    def _example(self, answer: Answer, prompt: list[int], ids: list[int], step: int) -> Example:
        self.control.check_encoded(answer.text, ids, self._ids_of, cut=False)
        notes: tuple[str, ...] = ()
        shared = min(common_prefix(prompt, ids), len(ids) - 1)
        if len(ids) > self.max_length:
            if self.settings.too_long == "drop":
                raise LeftOut(TOO_LONG)
            if shared >= self.max_length:
                raise LeftOut(PROMPT_TOO_LONG)
            ids, notes = ids[: self.max_length], (TRUNCATED,)
        columns = {"input_ids": ids, "parts": [shared, step], "desirable": [int(answer.desirable)]}
        return Example(columns, {}, notes)


def _shape_of(values: Mapping[str, Any]) -> str:
    if values.get("label") is None:
        return preference_pairs.shape_of(values)
    return "messages" if values.get("messages") is not None and values.get("completion") is None else "unpaired"


def _read(settings: KtoSettings, record: Record) -> list[Answer]:
    """One answer, or the chosen and the rejected one of a pair. Raises RowError."""
    shape = settings.shape if settings.shape != "auto" else _shape_of(record.values)
    if shape in UNPAIRED:
        return [Answer(_text(record.values, shape, settings.system), _label(require(record.values, "label")))]
    pair = read_pair(record.values, shape, settings.system)
    return [Answer(pair.chosen, True), Answer(pair.rejected, False)]


def _label(value: Any) -> bool:
    truth = _TRUTH.get(str(value).strip().lower())  # the columns of a CSV file are texts
    if truth is None:
        what = repr(value) if isinstance(value, str | int | float) else json_type(value)
        raise RowError(f"the label {what} is not true or false. Correct or remove the row.")
    return truth


def _text(values: Mapping[str, Any], shape: str, system: str | None) -> Conversation | Plain:
    """The text of an unpaired row. Raises RowError."""
    if shape == "messages":
        messages = [as_message(message, i) for i, message in enumerate(require_list(values, "messages"))]
        prompt, answer = messages[:-1], messages[-1:]
    elif isinstance(require(values, "completion"), str) and not isinstance(values.get("prompt"), list):
        return Plain(require_text(values, "prompt", empty=True), require_text(values, "completion"))
    else:
        prompt, answer = _messages(values, "prompt", "user"), _messages(values, "completion", "assistant")
    if not answer or answer[-1]["role"] != "assistant":
        raise RowError("the last message is not from the assistant. End with the answer, or remove the row.")
    own = values.get("system")
    if own is not None and (problem := text_problem("system", own)):
        raise RowError(problem)
    if (own or system) and not (prompt and prompt[0]["role"] == "system"):
        prompt = [{"role": "system", "content": own or system}, *prompt]
    return Conversation([*prompt, *answer], tools_of(values), len(prompt))


def _messages(values: Mapping[str, Any], role: str, speaker: str) -> list[Message]:
    """The messages of a column: a list, one message, or a text of `speaker`."""
    value = require(values, role)
    if isinstance(value, str):
        return [{"role": speaker, "content": require_text(values, role)}]
    turns = [value] if isinstance(value, dict) else require_list(values, role)
    try:
        return [as_message(turn, i) for i, turn in enumerate(turns)]
    except RowError as error:
        raise RowError(f"{role}: {error}") from None
