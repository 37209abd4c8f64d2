"""Encodes rows for supervised fine-tuning: conversations, prompts with completions, and plain texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptft_dist.data.encoder import EncoderContext, Example, LeftOut, RowError
from ptft_dist.data.fast_bpe import TextTokens, Tokens
from ptft_dist.data.formats import Record
from ptft_dist.data.row_encoder import RowEncoder
from ptft_dist.data.tokenizer import adds_bos
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.common.chat import UNTEMPLATED, Conversation, FileShapes, Plain
from ptft_dist.tasks.common.chat_template import (
    ChatTemplate,
    Span,
    TemplateRefused,
    missing_end_of_turn,
    missing_template,
    saved_template,
)
from ptft_dist.tasks.common.control_tokens import ControlTokens
from ptft_dist.tasks.sft.chat import REQUIRED, check_shape, read_row, shape_of, with_answer
from ptft_dist.tasks.sft.settings import SftSettings

TRUNCATED = "truncated to data.max_length"
UNANSWERED = "truncated after the last assistant message"
TOO_LONG = "longer than data.max_length"
NO_ANSWER_LEFT = "without an assistant message within data.max_length"
ENCODED_IN_PART = "much longer than data.max_length: only their beginning was tokenized"

CHARACTERS_PER_TOKEN = 200
"""Only the first data.max_length times this many characters are tokenized, because tokenization of long texts is slow.
The longest tokens of GPT-2 and Llama have 128 characters."""


@dataclass(frozen=True)
class Rendering:
    """A row rendered as text."""

    parsed: Conversation | Plain
    text: str
    spans: list[Span]
    """[start, end) of the assistant's turns, in characters."""
    cut: bool
    """Only the beginning of the text is tokenized."""


class ConversationRows(RowEncoder):
    """Encodes conversations and texts. Columns: input_ids, and the label mask `learned` (1: a target), both [T].

    The first token is never a target.
    """

    answer_roles = ("completion", "output")
    columns = {"learned": "u1"}
    text_only = False  # the template's special tokens are control tokens; a text that contains one is refused

    libraries = ("transformers", "trl")  # their versions affect the label mask
    settings: SftSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        tokenizer = self.tokenizer
        if tokenizer.eos_token is None:
            template_hint = "" if self.settings.shape == "text" else missing_template(tokenizer, self.settings.section)
            raise RecipeError(
                "tokenizer: it has no EOS token, so the end of an answer cannot be learned. Name one as eos_token in "
                "its tokenizer_config.json." + (f"\n{template_hint}" if template_hint else "")
            )
        self._template: ChatTemplate | None = None
        self._shapes = FileShapes()
        self._rendered: dict[int, Rendering] = {}  # passed from `pieces` to `build`
        self._tokens = TextTokens(self.backend, offsets=True)
        self.control = ControlTokens(tokenizer)
        self.begin = [tokenizer.bos_token_id] if adds_bos(tokenizer) else []  # of a plain text

    @property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template.

        Raises:
            RecipeError: there is none, or it does not end the assistant's turns with a special token.
        """
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer, self.settings.section)
            end = self._end_of_turn(self._template)
            self.discovered = {"end_of_turn": self.tokenizer.convert_tokens_to_ids(end)}
        return self._template

    def _end_of_turn(self, template: ChatTemplate) -> str:
        """The special token that ends the assistant's text.

        Raises:
            RecipeError: no special token follows it in its turn, or the template refuses a test conversation.
        """
        answer = "ANSWER"
        try:
            probe = template.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}], None)
        except TemplateRefused as why:
            raise RecipeError(f"sft.template: {why}. It must render a user and an assistant message.") from None
        start, end = probe.spans[-1]
        if special_tokens := self.control.pattern.findall(probe.text[start:end].rpartition(answer)[2]):
            return special_tokens[0]
        raise RecipeError(
            f"sft.template: the assistant's turn ends without a special token ({probe.text[start:end]!r}), so the "
            "model would never learn to stop. "
            + missing_end_of_turn(self.tokenizer, template.template, self.settings.section)
        )

    @classmethod
    def required(cls, settings: SftSettings) -> tuple[str, ...]:
        return REQUIRED.get(settings.shape, ())

    @classmethod
    def tokenizer_template(cls, settings: SftSettings, base: Path, *, learned: bool) -> str | None:
        return saved_template(settings, base, learned=learned)

    @classmethod
    def check(cls, settings: SftSettings, record: Record) -> None:
        check_shape(record.values, settings.shape)
        super().check(settings, record)
        parsed = _read(settings, record)
        if settings.shape == "prompt_completion" and isinstance(parsed, Plain):
            for key in ("template", "system"):
                if getattr(settings, key) is not None:
                    raise RowError(
                        f"prompt and completion are texts, for which sft.{key} has no effect. Set sft.shape: "
                        f"single_turn for a question of the user and an answer, or remove sft.{key}."
                    )
        if isinstance(parsed, Plain) and settings.loss == "last" and not parsed.prompt:
            raise RowError("plain text has no turns, and sft.loss: last needs a last turn. Set sft.loss: all.")

    @classmethod
    def texts(cls, settings: SftSettings, record: Record) -> Iterator[str]:
        parsed = _read(settings, record)
        if isinstance(parsed, Plain):
            yield parsed.prompt + parsed.completion
        else:
            yield from (message["content"] for message in parsed.messages if message["content"])

    @classmethod
    def unanswered(
        cls,
        settings: SftSettings,  # noqa: ARG003
        survey: Mapping[str, Any],  # noqa: ARG003
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        return with_answer(values, ".")

    def pieces(self, record: Record) -> Sequence[Any]:
        parsed = _read(self.settings, record)
        self.control.check_texts(parsed)
        text, spans = self._render(parsed)
        longest = self.max_length * CHARACTERS_PER_TOKEN
        self._rendered[id(record)] = Rendering(parsed, text, spans, len(text) > longest)
        return [text[:longest]]

    def admit(self, record: Record) -> None:
        """With shape: auto, check that all rows of a file have the shape of its first row. Raises RowError."""
        if self.settings.shape == "auto":
            self._shapes.check(record, shape_of(record.values))

    def _render(self, parsed: Conversation | Plain) -> tuple[str, list[Span]]:
        """The whole text, and the spans of the assistant's turns to learn."""
        if isinstance(parsed, Plain):
            text = self._plain_text(parsed)
            return text, [(len(parsed.prompt), len(text))]
        try:
            rendered = self.template.render(parsed.messages, parsed.tools)
        except TemplateRefused as why:
            raise RowError(f"{why}.") from None
        turns = [i for i, message in enumerate(parsed.messages) if message["role"] == "assistant"]
        given = sum(i < parsed.given for i in turns)
        if given and len(rendered.spans) != len(turns):
            raise RowError(
                f"the chat template renders {len(rendered.spans)} turns for {len(turns)} assistant messages, so it is "
                "unknown which of them belong to the prompt. Use another template, or the shape messages."
            )
        return rendered.text, rendered.spans[given:]

    def _plain_text(self, parsed: Plain) -> str:
        return parsed.prompt + parsed.completion + self.tokenizer.eos_token

    def encode(self, pieces: Sequence[str]) -> list[Tokens]:
        return self._tokens.of(pieces)

    def _begun(self, parsed: Conversation | Plain, tokens: Tokens) -> Tokens:
        """The tokens of a row, with BOS before a plain text. A chat template writes its own.

        The text is tokenized without BOS, as the tokenizer itself does: those of Llama and Mistral encode a first word
        after the text of BOS differently.
        """
        if isinstance(parsed, Conversation) or not self.begin:
            return tokens
        assert tokens.offsets is not None
        none = np.zeros((len(self.begin), 2), np.int64)
        return Tokens(np.concatenate((self.begin, tokens.ids)), np.concatenate((none, tokens.offsets)))

    def _ids_of(self, parsed: Conversation | Plain) -> np.ndarray:
        """The token ids of a row whose texts were replaced by neutral ones, see `ControlTokens.check_encoded`.

        Raises:
            RowError: the template refuses it.
        """
        if isinstance(parsed, Plain):
            text = self._plain_text(parsed)
        else:
            try:
                text = self.template.text(parsed.messages, parsed.tools)
            except TemplateRefused as why:
                raise RowError(f"{why} (with placeholder texts, to check the row's special tokens).") from None
        return self._begun(parsed, self.encode([text])[0]).ids

    def build(self, record: Record, encodings: Sequence[Any]) -> list[Example]:
        row, notes = self._rendered.pop(id(record)), []
        encoding, in_part = self._begun(row.parsed, encodings[0]), row.cut
        if in_part and len(encoding.ids) <= self.max_length:  # tokens longer than CHARACTERS_PER_TOKEN
            encoding, in_part = self._begun(row.parsed, self.encode([row.text])[0]), False
        self.control.check_encoded(row.parsed, encoding.ids, self._ids_of, cut=in_part)
        if isinstance(row.parsed, Conversation) and row.parsed.unanswered:
            notes.append(UNANSWERED)
        if isinstance(row.parsed, Plain) and row.parsed.prompt and self.tokenizer.chat_template:
            notes.append(UNTEMPLATED)
        if len(encoding.ids) > self.max_length:
            if self.settings.too_long == "drop":
                raise LeftOut(TOO_LONG)
            notes.append(TRUNCATED)
        if in_part:
            notes.append(ENCODED_IN_PART)
        # Tokens after max_length are not used, and searching their offsets is slow for long texts.
        ids = encoding.ids[: self.max_length].astype(np.int64)
        assert encoding.offsets is not None
        offsets = encoding.offsets[: self.max_length]
        learned = learned_tokens(offsets, self._learned_spans(row.spans, len(row.text)))
        learned[:1] = 0
        if not learned.any():
            raise LeftOut(NO_ANSWER_LEFT)
        return [Example({"input_ids": ids, "learned": learned}, self._meta(row, ids, offsets), tuple(notes))]

    def _meta(self, row: Rendering, ids: np.ndarray, offsets: np.ndarray) -> dict[str, Any]:
        """Meta for generation at evaluations: the last answer that begins within data.max_length, and its prompt."""
        parsed, spans = row.parsed, row.spans
        starts = [int(learned.argmax()) if (learned := learned_tokens(offsets, [s])).any() else len(ids) for s in spans]
        last = max((i for i, start in enumerate(starts) if start < len(ids)), default=0)
        prompt = ids[: starts[last]].tolist()
        if isinstance(parsed, Plain):
            source = parsed.prompt
        else:
            answers = [i for i, message in enumerate(parsed.messages) if message["role"] == "assistant"]
            previous = answers[last + len(answers) - len(spans)] - 1
            source = parsed.messages[previous]["content"] if previous >= 0 else ""
        bos = self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id
        reference = self.control.pattern.sub("", row.text[slice(*spans[last])]).strip()
        return {"prompt": prompt or [bos], "source": source, "reference": reference}

    def _learned_spans(self, spans: list[Span], end: int) -> list[Span]:
        """The spans to learn, by sft.loss. spans: the assistant's turns; end: length of the whole text."""
        if self.settings.loss == "all":
            return [(0, end)]
        return spans[-1:] if self.settings.loss == "last" else spans


def learned_tokens(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """The label mask: uint8 [T], 1 from the first to the last token that overlaps a span.

    Args:
        offsets: [start, end) of each token in the text, in characters: int64 [T, 2].
        spans: [start, end) of the texts to learn, in characters.
    """
    learned = np.zeros(len(offsets), np.uint8)
    for start, end in spans:
        (inside,) = np.nonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        if len(inside):
            learned[inside[0] : inside[-1] + 1] = 1  # some tokenizers return empty offsets for blanks in between
    return learned


def _read(settings: SftSettings, record: Record) -> Conversation | Plain:
    shape = settings.shape if settings.shape != "auto" else shape_of(record.values)
    return read_row(record.values, shape, settings.system, settings.loss)
