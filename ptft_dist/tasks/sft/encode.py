"""Rows for supervised fine-tuning: conversations through a chat template, prompts with completions, plain texts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ptft_dist.data.encoder import EncoderContext, Example, LeftOut, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.row_encoder import RowEncoder
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.sft.chat import SHAPES, Conversation, Plain, read_row, shape_of
from ptft_dist.tasks.sft.chat_template import ChatTemplate, Span, TemplateRefused, saved_template
from ptft_dist.tasks.sft.settings import SftSettings

if TYPE_CHECKING:
    from tokenizers import Encoding

CUT = "cut to data.max_length"
UNANSWERED = "lost their last messages, which nobody answers"
TOO_LONG = "left out, longer than data.max_length"
NO_ANSWER_LEFT = "left out, for no answer is left within data.max_length"


class ConversationRows(RowEncoder):
    """Columns: input_ids, and learned: 1 for the tokens that are to be predicted, [T]. The first token never is."""

    columns = {"learned": "u1"}
    text_only = False  # the template's special tokens are meant; a text that spells one is refused

    libraries = ("transformers", "trl")  # they decide which tokens are learned
    settings: SftSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        tokenizer = self.tokenizer
        if tokenizer.eos_token is None:
            raise RecipeError("tokenizer: it has no EOS token, so the end of an answer cannot be learned (eos_token)")
        self._template: ChatTemplate | None = None
        self._shapes: dict[str, str] = {}
        self._rendered: dict[int, tuple[Conversation | Plain, str, list[Span]]] = {}  # between pieces and build
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.control = re.compile("|".join(re.escape(token) for token in sorted(special, key=len, reverse=True)))
        first = tokenizer("a")["input_ids"][0]
        self.begin = tokenizer.bos_token if first == tokenizer.bos_token_id and tokenizer.bos_token else ""

    @property
    def template(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer)
            end = self._end_is_learned(self._template)
            self.discovered = {"end_of_turn": self.tokenizer.convert_tokens_to_ids(end)}
        return self._template

    def _end_is_learned(self, template: ChatTemplate) -> str:
        """The special token that ends the assistant's turn.

        Raises:
            RecipeError: no end-of-turn token is among what the assistant says.
        """
        try:
            probe = template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None)
        except TemplateRefused as why:
            raise RecipeError(f"sft.template: {why}") from None
        start, end = probe.spans[-1]
        found = self.control.findall(probe.text[start:end])
        if not found:
            raise RecipeError(
                "sft.template: the end of the assistant's turn is no special token, or stands outside of the "
                f"template's generation markers ({probe.text[start:end]!r}), so the model would never learn to stop. "
                "Use another template, or make the token special in the tokenizer."
            )

        return found[-1]

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
        self._no_control_tokens(said)
        text, spans = self._render(said)
        self._rendered[id(record)] = said, text, spans
        return [text]

    def admit(self, record: Record) -> None:
        """All rows of a file have the shape of its first row."""
        if self.settings.shape != "auto":
            return
        file, shape = re.sub(r"[:#]\d+$", "", record.where), shape_of(record.values)
        first = self._shapes.setdefault(file, shape)
        if shape != first:
            raise RowError(f"this row's shape is {shape}, but the file begins with {first}. Put them into two files.")

    def _no_control_tokens(self, said: Conversation | Plain) -> None:
        texts = [said.prompt, said.completion] if isinstance(said, Plain) else _all_texts(said.messages)
        for text in texts:
            if found := self.control.search(text):
                raise RowError(f"the text spells the special token {found.group()!r}. Remove it from the row.")

    def _render(self, said: Conversation | Plain) -> tuple[str, list[Span]]:
        """The whole text, and what of it the assistant says."""
        if isinstance(said, Plain):
            text = self.begin + said.prompt + said.completion + self.tokenizer.eos_token
            return text, [(len(self.begin) + len(said.prompt), len(text))]
        try:
            rendered = self.template.render(said.messages, said.tools)
        except TemplateRefused as why:
            raise RowError(f"{why}.") from None
        turns = [i for i, message in enumerate(said.messages) if message["role"] == "assistant"]
        given = sum(i < said.given for i in turns)
        if given and len(rendered.spans) != len(turns):
            raise RowError(
                f"the chat template shows {len(rendered.spans)} of {len(turns)} answers, so it is not known which of "
                "them are given. Use another template, or rows of messages."
            )
        return rendered.text, rendered.spans[given:]

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        said, text, spans = self._rendered.pop(id(record))
        encoding, notes = encodings[0], []
        if isinstance(said, Conversation) and said.unanswered:
            notes.append(UNANSWERED)
        if len(encoding.ids) > self.max_length:
            if self.settings.too_long == "drop":
                raise LeftOut(TOO_LONG)
            notes.append(CUT)
        learned = learned_tokens(encoding.offsets, self._wanted(spans, len(text)))
        learned[:1] = 0
        if not learned[: self.max_length].any():
            raise LeftOut(NO_ANSWER_LEFT)
        columns = {"input_ids": encoding.ids[: self.max_length], "learned": learned[: self.max_length]}
        return [Example(columns, self._meta(said, text, spans, encoding), tuple(notes))]

    def _meta(self, said: Conversation | Plain, text: str, spans: list[Span], encoding: Encoding) -> dict[str, Any]:
        """For an evaluation that writes: the last answer that begins within data.max_length, and what stands before."""
        begins = [int(learned_tokens(encoding.offsets, [span]).argmax()) for span in spans]
        last = max((i for i, begin in enumerate(begins) if begin < self.max_length), default=0)
        prompt = encoding.ids[: min(begins[last], self.max_length)]
        if isinstance(said, Plain):
            source = said.prompt
        else:
            answers = [i for i, message in enumerate(said.messages) if message["role"] == "assistant"]
            before = answers[last + len(answers) - len(spans)] - 1
            source = said.messages[before]["content"] if before >= 0 else ""
        begin = self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        reference = self.control.sub("", text[slice(*spans[last])]).strip()
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


def _all_texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _all_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _all_texts(inner)
