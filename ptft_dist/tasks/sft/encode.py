"""Rows for supervised fine-tuning: conversations through a chat template, prompts with completions, plain texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ptft_dist.data.encoder import EncoderContext, Example, LeftOut, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.row_encoder import RowEncoder
from ptft_dist.data.tokenizer import adds_bos
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.sft.chat import SHAPES, Conversation, Plain, read_row, shape_of
from ptft_dist.tasks.sft.chat_template import (
    ChatTemplate,
    Span,
    TemplateRefused,
    missing_end_of_turn,
    missing_template,
    saved_template,
)
from ptft_dist.tasks.sft.control_tokens import ControlTokens
from ptft_dist.tasks.sft.settings import SftSettings

if TYPE_CHECKING:
    from tokenizers import Encoding

TRUNCATED = "truncated to data.max_length"
UNANSWERED = "truncated after the last assistant message"
TOO_LONG = "longer than data.max_length"
NO_ANSWER_LEFT = "without an assistant message within data.max_length"
ENCODED_IN_PART = "much longer than data.max_length: only their beginning was tokenized"

CHARACTERS_PER_TOKEN = 200
"""Longer texts than data.max_length times this are tokenized in part; GPT-2's and Llama's longest tokens have 128."""


@dataclass(frozen=True)
class Rendering:
    """A row as text. spans: what the assistant says, in characters. cut: only the beginning of it is tokenized."""

    said: Conversation | Plain
    text: str
    spans: list[Span]
    cut: bool


class ConversationRows(RowEncoder):
    """Columns: input_ids, and learned: 1 for the tokens that are to be predicted, [T]. The first token never is."""

    columns = {"learned": "u1"}
    text_only = False  # the template's special tokens are control tokens; a text that spells one is refused

    libraries = ("transformers", "trl")  # they decide which tokens are learned
    settings: SftSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        tokenizer = self.tokenizer
        if tokenizer.eos_token is None:
            with_turns = "" if self.settings.shape == "text" else missing_template(tokenizer)
            raise RecipeError(
                "tokenizer: it has no EOS token, so the end of an answer cannot be learned. Name one as eos_token in "
                "its tokenizer_config.json." + (f"\n{with_turns}" if with_turns else "")
            )
        self._template: ChatTemplate | None = None
        self._shapes: dict[str, str] = {}
        self._rendered: dict[int, Rendering] = {}  # between pieces and build
        self.control = ControlTokens(tokenizer)
        self.begin = tokenizer.bos_token or "" if adds_bos(tokenizer) else ""

    @property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template, which rows with turns need.

        Raises:
            RecipeError: there is none, or the end of a turn could not be learned with it.
        """
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer)
            end = self._end_of_turn(self._template)
            self.discovered = {"end_of_turn": self.tokenizer.convert_tokens_to_ids(end)}
        return self._template

    def _end_of_turn(self, template: ChatTemplate) -> str:
        """The special token that ends the assistant's turn.

        Raises:
            RecipeError: there is none among what the assistant says.
        """
        try:
            probe = template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None)
        except TemplateRefused as why:
            raise RecipeError(f"sft.template: {why}. It must show a user and an assistant message.") from None
        start, end = probe.spans[-1]
        if found := self.control.pattern.findall(probe.text[start:end]):
            return found[-1]
        raise RecipeError(
            f"sft.template: the assistant's turn ends without a special token ({probe.text[start:end]!r}), so the "
            "model would never learn to stop. " + missing_end_of_turn(self.tokenizer, template.template)
        )

    @classmethod
    def required(cls, settings: SftSettings) -> tuple[str, ...]:
        return SHAPES.get(settings.shape, ())

    @classmethod
    def tokenizer_template(cls, settings: SftSettings, base: Path, *, learned: bool) -> str | None:
        return saved_template(settings, base, learned=learned)

    @classmethod
    def check(cls, settings: SftSettings, record: Record) -> None:
        super().check(settings, record)
        said = _read(settings, record)
        if isinstance(said, Plain) and settings.loss == "last" and not said.prompt:
            raise RowError("plain text has no turns, so there is no last one to learn (sft.loss: last)")

    @classmethod
    def texts(cls, settings: SftSettings, record: Record) -> Iterator[str]:
        said = _read(settings, record)
        if isinstance(said, Plain):
            yield said.prompt + said.completion
        else:
            yield from (message["content"] for message in said.messages if message["content"])

    def pieces(self, record: Record) -> Sequence[Any]:
        said = _read(self.settings, record)
        self.control.check_texts(said)
        text, spans = self._render(said)
        longest = self.max_length * CHARACTERS_PER_TOKEN
        self._rendered[id(record)] = Rendering(said, text, spans, len(text) > longest)
        return [text[:longest]]

    def admit(self, record: Record) -> None:
        """All rows of a file have the shape of its first row."""
        if self.settings.shape != "auto":
            return
        file, shape = re.sub(r"[:#]\d+$", "", record.where), shape_of(record.values)
        first = self._shapes.setdefault(file, shape)
        if shape != first:
            raise RowError(f"this row's shape is {shape}, but the file begins with {first}. Put them into two files.")

    def _render(self, said: Conversation | Plain) -> tuple[str, list[Span]]:
        """The whole text, and the spans of it that the assistant says."""
        if isinstance(said, Plain):
            text = self._plain_text(said)
            return text, [(len(self.begin) + len(said.prompt), len(text))]
        try:
            rendered = self.template.render(said.messages, said.tools)
        except TemplateRefused as why:
            raise RowError(f"{why}.") from None
        turns = [i for i, message in enumerate(said.messages) if message["role"] == "assistant"]
        given = sum(i < said.given for i in turns)
        if given and len(rendered.spans) != len(turns):
            raise RowError(
                f"the chat template shows {len(rendered.spans)} of {len(turns)} assistant messages, so it is not known "
                "which of them belong to the prompt. Use another template, or rows of messages."
            )
        return rendered.text, rendered.spans[given:]

    def _plain_text(self, said: Plain) -> str:
        return self.begin + said.prompt + said.completion + self.tokenizer.eos_token

    def _ids_of(self, said: Conversation | Plain) -> list[int]:
        """The ids of a row whose texts are neutral.

        Raises:
            RowError: the template does not take it.
        """
        if isinstance(said, Plain):
            text = self._plain_text(said)
        else:
            try:
                text = self.template.text(said.messages, said.tools)
            except TemplateRefused as why:
                raise RowError(f"{why} (with neutral texts, to check the row's special tokens).") from None
        return self.encode([text])[0].ids

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        row, encoding, notes = self._rendered.pop(id(record)), encodings[0], []
        in_part = row.cut
        if in_part and len(encoding.ids) <= self.max_length:  # tokens longer than any that is known
            (encoding,), in_part = self.encode([row.text]), False
        self.control.check_encoded(row.said, encoding.ids, self._ids_of, cut=in_part)
        if isinstance(row.said, Conversation) and row.said.unanswered:
            notes.append(UNANSWERED)
        if len(encoding.ids) > self.max_length:
            if self.settings.too_long == "drop":
                raise LeftOut(TOO_LONG)
            notes.append(TRUNCATED)
        if in_part:
            notes.append(ENCODED_IN_PART)
        # Tokens behind max_length are of no use, and their offsets of a long text take long to look through.
        ids, offsets = encoding.ids[: self.max_length], encoding.offsets[: self.max_length]
        learned = learned_tokens(offsets, self._wanted(row.spans, len(row.text)))
        learned[:1] = 0
        if not learned.any():
            raise LeftOut(NO_ANSWER_LEFT)
        return [Example({"input_ids": ids, "learned": learned}, self._meta(row, ids, offsets), tuple(notes))]

    def _meta(self, row: Rendering, ids: list[int], offsets: list[tuple[int, int]]) -> dict[str, Any]:
        """For generation at an evaluation: the last answer that begins within data.max_length, and its prompt."""
        said, spans = row.said, row.spans
        begins = [int(learned.argmax()) if (learned := learned_tokens(offsets, [s])).any() else len(ids) for s in spans]
        last = max((i for i, begin in enumerate(begins) if begin < len(ids)), default=0)
        prompt = ids[: begins[last]]
        if isinstance(said, Plain):
            source = said.prompt
        else:
            answers = [i for i, message in enumerate(said.messages) if message["role"] == "assistant"]
            before = answers[last + len(answers) - len(spans)] - 1
            source = said.messages[before]["content"] if before >= 0 else ""
        begin = self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        reference = self.control.pattern.sub("", row.text[slice(*spans[last])]).strip()
        return {"prompt": prompt or [begin], "source": source, "reference": reference}

    def _wanted(self, spans: list[Span], end: int) -> list[Span]:
        if self.settings.loss == "all":
            return [(0, end)]
        return spans[-1:] if self.settings.loss == "last" else spans


def learned_tokens(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> np.ndarray:
    """uint8 [T]: 1 from the first to the last token that shares a character with a span.

    offsets: [start, end) of each token in the text.
    """
    places = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    learned = np.zeros(len(places), np.uint8)
    for start, end in spans:
        (inside,) = np.nonzero((places[:, 0] < end) & (places[:, 1] > start))
        if len(inside):
            learned[inside[0] : inside[-1] + 1] = 1  # some tokenizers give blanks in between no width
    return learned


def _read(settings: SftSettings, record: Record) -> Conversation | Plain:
    shape = settings.shape if settings.shape != "auto" else shape_of(record.values)
    return read_row(record.values, shape, settings.system)
