"""Encodes rows with a question, a context and its answers. A long context is split into overlapping windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptft_dist.data.encoder import EncoderContext, Example, LeftOut, RowError
from ptft_dist.data.formats import Record, json_type
from ptft_dist.data.row_encoder import RowEncoder, require, require_text
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.common.frame import Frame
from ptft_dist.tasks.question_answering.settings import QuestionAnsweringSettings

if TYPE_CHECKING:
    from tokenizers import Encoding

WINDOWS = "longer than data.max_length: split into several windows"
BROKEN = "with an answer split by every window, so it is not learned; raise question_answering.stride"
NO_ROOM = "with a question too long for windows that overlap by question_answering.stride tokens"


class QuestionRows(RowEncoder):
    """Encodes one example per window.

    Columns:
        input_ids, token_type_ids: [T].
        context: [start, end) of the context's tokens.
        start, end: the answer's first and last token; both [CLS] if the window does not contain the whole answer.

    Meta of an example:
        question: number of the question.
        context: the window's part of it.
        offsets: [start, end) of each of its tokens in this part, in characters.
        begin: where this part begins in the whole context, in characters.
        answers: the gold answers; empty if there is no answer.
    """

    surveys = True
    answer_roles = ("answers",)
    numbered = "question"
    columns = {"token_type_ids": "u1", "context": "<i4", "start": "<i4", "end": "<i4"}

    settings: QuestionAnsweringSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        self.frame = Frame.of(self.tokenizer, self.backend, 2)
        self.stride, self.cls = self.settings.stride, self.tokenizer.cls_token_id
        if self.max_length - len(self.frame) <= self.stride:
            raise RecipeError(
                f"question_answering.stride: {self.stride} leaves no room in data.max_length ({self.max_length}) with "
                f"{len(self.frame)} special tokens. Lower it, or raise data.max_length."
            )

    @classmethod
    def check(cls, settings: QuestionAnsweringSettings, record: Record) -> None:
        super().check(settings, record)
        require_text(record.values, "question")
        context = require_text(record.values, "context")
        for text, start in answers_of(record):
            if context[start : start + len(text)] != text:
                raise RowError(_misplaced_answer(context, text, start))

    @classmethod
    def texts(cls, settings: QuestionAnsweringSettings, record: Record) -> Iterator[str]:  # noqa: ARG003
        yield record.values["question"]
        yield record.values["context"]

    @classmethod
    def survey_of(
        cls,
        settings: QuestionAnsweringSettings,  # noqa: ARG003
        records: Iterable[Record],
        seed: int,  # noqa: ARG003
    ) -> dict[str, Any]:
        """The number of training rows without an answer, as `unanswerable`."""
        return {"unanswerable": sum(not answers_of(record) for record in records)}

    @classmethod
    def unanswered(
        cls,
        settings: QuestionAnsweringSettings,  # noqa: ARG003
        survey: Mapping[str, Any],  # noqa: ARG003
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {**values, "answers": {"text": [], "answer_start": []}}

    def warnings(self) -> list[str]:
        return self.frame.unmarked()

    def pieces(self, record: Record) -> Sequence[Any]:
        return [record.values["question"], record.values["context"]]

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        question, context = encodings
        if not context.ids:
            raise RowError("the tokenizer returns no token for the context. Correct or remove the row.")
        room = self.max_length - len(self.frame) - len(question.ids)
        if room < 1 or (len(context.ids) > room and room <= self.stride):
            raise LeftOut(NO_ROOM)
        answers = answers_of(record)
        target = _tokens_of(*answers[0], context.offsets) if answers else None
        windows = _windows(len(context.ids), room, self.stride)
        learned = target is None or any(target[0] in window and target[1] in window for window in windows)
        notes = ((WINDOWS,) if len(windows) > 1 else ()) + (() if learned else (BROKEN,))
        gold = {"answers": [text for text, _ in answers]}
        return [
            Example(
                self.window_columns(question.ids, context.ids, window, target),
                {**gold, **_window_text(record.values["context"], context.offsets[window.start : window.stop])},
                notes,
            )
            for window in windows
        ]

    def window_columns(
        self, question: Sequence[int], context: Sequence[int], window: range, target: tuple[int, int] | None
    ) -> dict[str, Any]:
        """The columns of one window. target: the answer's first and last token in the whole context."""
        ids, types = self.frame.fill(question, context[window.start : window.stop])
        first = len(self.frame.ids[0]) + len(question) + len(self.frame.ids[1])
        nowhere = ids.index(self.cls) if self.cls in ids else 0
        start, end = nowhere, nowhere
        if target is not None and target[0] in window and target[1] in window:
            start, end = (first + token - window.start for token in target)
        return {
            "input_ids": ids,
            "token_type_ids": types,
            "context": [first, first + len(window)],
            "start": start,
            "end": end,
        }


def answers_of(record: Record) -> list[tuple[str, int]]:
    """The answers of a row: (text, start in the context in characters).

    Raises:
        RowError: the column does not have SQuAD's format.
    """
    answers = require(record.values, "answers")
    expected = "{text: [...], answer_start: [...]}, with empty lists if there is no answer"
    if not isinstance(answers, dict):
        raise RowError(f"the field 'answers' is {json_type(answers)} and not {expected}.")
    for key in ("text", "answer_start"):
        if not isinstance(answers.get(key), list):
            raise RowError(f"answers: {key!r} is not a list; the field has the form {expected}.")
    texts, starts = answers["text"], answers["answer_start"]
    if len(texts) != len(starts):
        raise RowError(
            f"answers: text has {len(texts)} items, answer_start has {len(starts)}. Give one start for each text."
        )
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            got = "empty" if isinstance(text, str) else json_type(text)
            raise RowError(f"answers: an answer is {got}. If there is no answer, leave both lists empty.")
        if not isinstance(start, int) or isinstance(start, bool) or start < 0:
            raise RowError(f"answers: answer_start of {text!r} is {start!r} and not a whole number from 0.")
    return list(zip(texts, starts, strict=True))


def _misplaced_answer(context: str, text: str, start: int) -> str:
    position = context.find(text)
    hint = f"it is at {position}" if position >= 0 else "the context does not contain it"
    return (
        f"answers: the answer {text!r} is not at answer_start {start}, where the context has "
        f"{context[start : start + len(text)]!r}; {hint}. Positions count characters (not bytes) from 0."
    )


def _tokens_of(text: str, start: int, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The first and the last token that overlap the answer.

    Raises:
        RowError: no token overlaps it.
    """
    overlapping = [i for i, (begin, end) in enumerate(offsets) if begin < start + len(text) and end > start]
    if not overlapping:
        raise RowError(f"answers: the tokenizer returns no token for the answer {text!r}. Correct or remove the row.")
    return overlapping[0], overlapping[-1]


def _windows(tokens: int, room: int, stride: int) -> list[range]:
    """Windows of `room` tokens that overlap by `stride` tokens. The last window ends with the context."""
    step = max(room - stride, 1)
    starts = range(0, max(tokens - room, 0) + step, step)
    return [range(start, min(start + room, tokens)) for start in starts]


def _window_text(context: str, offsets: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """A window's part of the context, and the character offsets of its tokens in this part."""
    begin, end = offsets[0][0], offsets[-1][1]
    return {"context": context[begin:end], "begin": begin, "offsets": [[a - begin, b - begin] for a, b in offsets]}
