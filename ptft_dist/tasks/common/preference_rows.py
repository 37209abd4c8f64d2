"""Encodes preference rows: a prompt with a chosen and a rejected answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptft_dist.data.encoder import EncoderContext, Example, LeftOut, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.row_encoder import RowEncoder
from ptft_dist.data.tokenizer import added_around, after_answer, check_can_pad
from ptft_dist.tasks.common.chat import Conversation, FileShapes, Plain
from ptft_dist.tasks.common.chat_template import ChatTemplate, TemplateRefused, check_nothing_lost, saved_template
from ptft_dist.tasks.common.control_tokens import ControlTokens
from ptft_dist.tasks.common.preference_pairs import Pair, common_prefix, read_pair, shape_of
from ptft_dist.tasks.common.preference_settings import PreferenceSettings

if TYPE_CHECKING:
    from tokenizers import Encoding

TRUNCATED = "with a text truncated to data.max_length"
TOO_LONG = "with a text longer than data.max_length"
PROMPT_TOO_LONG = "with a prompt as long as data.max_length"
SAME_WHEN_CUT = "whose answers differ only beyond data.max_length"


class PreferenceRows(RowEncoder):
    """Encodes pairs. One row of the store is one pair; its columns:

    input_ids: the chosen text and then the rejected text, each with the prompt.
    parts [3]: number of tokens of the prompt, which both texts begin with, of the chosen and of the rejected text.
    margin [1]: by how much the chosen text is better; NaN if the row does not say.

    `halves` takes a row apart. The token ids are those of TRL's RewardTrainer and DPOTrainer.
    """

    columns = {"parts": "<i4", "margin": "<f4"}
    text_only = False  # the template's special tokens are control tokens; a text that contains one is refused
    libraries = ("transformers",)  # it renders the chat template

    settings: PreferenceSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        check_can_pad(self.tokenizer)
        self._template: ChatTemplate | None = None
        self._shapes = FileShapes()
        self._pairs: dict[int, Pair] = {}  # passed from `pieces` to `build`
        self.control = ControlTokens(self.tokenizer)
        _, after = added_around(self.tokenizer)
        self.end = "" if after else self.tokenizer.eos_token or ""  # the end of a plain text

    @property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template. Raises RecipeError: there is none."""
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer, self.settings.section, with_spans=False)
            if special := self.control.of(after_answer(self.tokenizer)):
                self.discovered = {"end_of_turn": special[0]}
        return self._template

    # --- without a tokenizer -----------------------------------------------------------------------------------------

    @classmethod
    def required(cls, settings: PreferenceSettings) -> tuple[str, ...]:
        more = {"single_turn": ("prompt",), "sharegpt": ("conversations",)}
        return "chosen", "rejected", *more.get(settings.shape, ())

    @classmethod
    def tokenizer_template(cls, settings: PreferenceSettings, base: Path, *, learned: bool) -> str | None:
        return saved_template(settings, base, learned=learned)

    @classmethod
    def check(cls, settings: PreferenceSettings, record: Record) -> None:
        super().check(settings, record)
        _read(settings, record)

    @classmethod
    def texts(cls, settings: PreferenceSettings, record: Record) -> Iterator[str]:
        pair = _read(settings, record)
        if isinstance(pair.chosen, Plain):
            assert isinstance(pair.rejected, Plain)
            yield from (pair.chosen.prompt + pair.chosen.completion, pair.rejected.completion)
        else:
            assert isinstance(pair.rejected, Conversation)
            messages = pair.chosen.messages + pair.rejected.messages[pair.rejected.given :]
            yield from (message["content"] for message in messages if message["content"])

    # --- with the tokenizer ------------------------------------------------------------------------------------------

    def admit(self, record: Record) -> None:
        """With shape: auto, check that all rows of a file have the shape of its first row. Raises RowError."""
        if self.settings.shape == "auto":
            self._shapes.check(record, shape_of(record.values))

    def pieces(self, record: Record) -> Sequence[Any]:
        """The prompt, the chosen and the rejected text, each with whether the tokenizer adds its special tokens."""
        pair = _read(self.settings, record)
        for side, parsed in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            try:
                self.control.check_texts(parsed)
            except RowError as error:
                raise RowError(f"{side}: {error}") from None
        plain = isinstance(pair.chosen, Plain)
        texts = self._prompt(pair.chosen), self._text(pair.chosen), self._text(pair.rejected)
        self._pairs[id(record)] = pair
        return [(text, plain) for text in texts]

    def encode(self, pieces: Sequence[Any]) -> list[Encoding]:
        """Tokenize texts. A piece: (text, whether the tokenizer adds its special tokens)."""
        encoded: dict[int, Encoding] = {}
        for add in (False, True):
            numbers = [i for i, piece in enumerate(pieces) if piece[1] == add]
            texts = [pieces[i][0] for i in numbers]
            encoded |= zip(numbers, self.backend.encode_batch(texts, add_special_tokens=add), strict=True)
        return [encoded[i] for i in range(len(pieces))]

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        pair = self._pairs.pop(id(record))
        prompt, chosen, rejected = (encoding.ids for encoding in encodings)
        for side, parsed, ids in (("chosen", pair.chosen, chosen), ("rejected", pair.rejected, rejected)):
            try:
                self.control.check_encoded(parsed, ids, self._ids_of, cut=False)
            except RowError as error:
                raise RowError(f"{side}: {error}") from None
        if chosen == rejected:
            raise RowError("chosen and rejected have the same tokens. Correct or remove the row.")
        shared = min(common_prefix(prompt, chosen), common_prefix(prompt, rejected))
        # An answer keeps a token, also if it begins with the other one.
        shared = min(shared, len(chosen) - 1, len(rejected) - 1)
        notes: tuple[str, ...] = ()
        if max(len(chosen), len(rejected)) > self.max_length:
            if self.settings.too_long == "drop":
                raise LeftOut(TOO_LONG)
            if shared >= self.max_length:
                raise LeftOut(PROMPT_TOO_LONG)
            chosen, rejected, notes = chosen[: self.max_length], rejected[: self.max_length], (TRUNCATED,)
            if chosen == rejected:
                raise LeftOut(SAME_WHEN_CUT)
        columns = {
            "input_ids": [*chosen, *rejected],
            "parts": [shared, len(chosen), len(rejected)],
            "margin": [pair.margin],
        }
        return [Example(columns, _meta(pair), notes)]

    def token_ids(self, parsed: Sequence[Conversation | Plain]) -> list[list[int]]:
        """The token ids of texts, which are tokenized in one call and not truncated.

        Raises:
            RowError: a text contains a special token, or has no token.
        """
        for each in parsed:
            self.control.check_texts(each)
        encodings = self.encode([(self._text(each), isinstance(each, Plain)) for each in parsed])
        for each, encoding in zip(parsed, encodings, strict=True):
            if not encoding.ids:
                raise RowError("the tokenizer returns no token for this text. Correct or remove the row.")
            self.control.check_encoded(each, encoding.ids, self._ids_of, cut=False)
        return [encoding.ids for encoding in encodings]

    def _prompt(self, parsed: Conversation | Plain) -> str:
        if isinstance(parsed, Plain):
            return parsed.prompt
        messages = parsed.messages[: parsed.given]
        return self._rendered(messages, parsed.tools, prompt=True) if messages else ""

    def _text(self, parsed: Conversation | Plain) -> str:
        if isinstance(parsed, Plain):
            return parsed.prompt + parsed.completion + self.end
        text = self._rendered(parsed.messages, parsed.tools)
        try:
            check_nothing_lost(parsed.messages, parsed.tools, text)
        except TemplateRefused as why:
            raise RowError(f"{why}.") from None
        return text

    def _rendered(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False) -> str:
        try:
            return self.template.text(messages, tools, prompt=prompt)
        except TemplateRefused as why:
            raise RowError(f"{why}.") from None

    def _ids_of(self, parsed: Conversation | Plain) -> list[int]:
        """The token ids of a row whose texts were replaced by neutral ones, see `ControlTokens.check_encoded`."""
        plain = isinstance(parsed, Plain)
        text = self._text(parsed) if isinstance(parsed, Plain) else self._rendered(parsed.messages, parsed.tools)
        return self.encode([(text, plain)])[0].ids


def halves(input_ids: Any, parts: Any) -> tuple[Any, Any]:
    """The token ids of the chosen and of the rejected text, each with the prompt, from the columns of a row."""
    return input_ids[: int(parts[1])], input_ids[int(parts[1]) :]


def _read(settings: PreferenceSettings, record: Record) -> Pair:
    shape = settings.shape if settings.shape != "auto" else shape_of(record.values)
    return read_pair(record.values, shape, settings.system)


def _meta(pair: Pair) -> dict[str, Any]:
    """The texts of a pair, to show samples."""
    if isinstance(pair.chosen, Plain):
        assert isinstance(pair.rejected, Plain)
        return {
            "prompt": pair.chosen.prompt,
            "chosen": pair.chosen.completion,
            "rejected": pair.rejected.completion,
        }
    assert isinstance(pair.rejected, Conversation)
    given = pair.chosen.given
    return {
        "prompt": pair.chosen.messages[given - 1]["content"] if given else "",
        "chosen": pair.chosen.messages[-1]["content"],
        "rejected": pair.rejected.messages[-1]["content"],
    }
