"""Encodes prompts for tasks that generate the responses themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptft_dist.data.encoder import EncoderContext, Example, LeftOut, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.json_values import not_json
from ptft_dist.data.row_encoder import RowEncoder, require_list, require_text
from ptft_dist.data.tokenizer import added_around, after_answer
from ptft_dist.tasks.common.chat import Conversation, Plain, as_message, tools_of
from ptft_dist.tasks.common.chat_template import ChatTemplate, TemplateRefused, check_nothing_lost, saved_template
from ptft_dist.tasks.common.control_tokens import ControlTokens
from ptft_dist.tasks.common.preference_pairs import with_system
from ptft_dist.tasks.common.rollout_settings import RolloutSettings

if TYPE_CHECKING:
    from tokenizers import Encoding

TOO_LONG = "longer than data.max_length"
CUT = "without their beginning, to fit data.max_length"
NO_COLUMN = "without the column {name!r} for reward functions ({why})"
ARGUMENTS = ("prompts", "completions", "completion_ids")
"""What every reward function gets besides the columns."""


class PromptRows(RowEncoder):
    """Encodes prompts: input_ids, and meta with the prompt as it was given, its tools, and the row's other columns, if
    JSON.

    A prompt is a text (`prompt`), which the tokenizer may begin with BOS, or a conversation (`prompt` or `messages`,
    with `system` and `tools`) that ends with a message of the user or a tool. Assistant messages at its end are
    removed.
    """

    columns = {}
    text_only = False  # the template's special tokens are control tokens; a text that contains one is refused
    libraries = ("transformers",)  # it renders the chat template
    keeps_meta = True  # reward functions read the columns of training rows

    settings: RolloutSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        self._template: ChatTemplate | None = None
        self.control = ControlTokens(self.tokenizer)
        self.begin, _ = added_around(self.tokenizer)
        self._prompts: dict[int, Plain | Conversation] = {}  # passed from `pieces` to `build`

    @property
    def template(self) -> ChatTemplate:
        """The tokenizer's chat template. Raises RecipeError: there is none."""
        if self._template is None:
            self._template = ChatTemplate(self.tokenizer, self.settings.section, with_spans=False)
            if special := self.control.of(after_answer(self.tokenizer)):
                self.discovered = {"end_of_turn": special[0]}
        return self._template

    @classmethod
    def required(cls, settings: RolloutSettings) -> tuple[str, ...]:  # noqa: ARG003
        return ()

    @classmethod
    def tokenizer_template(cls, settings: RolloutSettings, base: Path, *, learned: bool) -> str | None:
        return saved_template(settings, base, learned=learned)

    @classmethod
    def check(cls, settings: RolloutSettings, record: Record) -> None:
        _read(settings, record)

    @classmethod
    def texts(cls, settings: RolloutSettings, record: Record) -> Iterator[str]:
        prompt = _read(settings, record)
        if isinstance(prompt, Plain):
            yield prompt.prompt
        else:
            yield from (message["content"] for message in prompt.messages if message["content"])

    def pieces(self, record: Record) -> Sequence[Any]:
        prompt = self._prompts[id(record)] = _read(self.settings, record)
        self.control.check_texts(prompt)
        return [self._text(prompt)]

    def _text(self, prompt: Plain | Conversation) -> str:
        if isinstance(prompt, Plain):
            return prompt.prompt
        try:
            text = self.template.text(prompt.messages, prompt.tools, prompt=True)
            check_nothing_lost(prompt.messages, prompt.tools, text)
        except TemplateRefused as why:
            raise RowError(f"{why}.") from None
        return text

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        prompt, ids = self._prompts.pop(id(record)), encodings[0].ids
        notes: tuple[str, ...] = ()
        self.control.check_encoded(prompt, ids, lambda neutral: self.encode([self._text(neutral)])[0].ids, cut=False)
        plain = isinstance(prompt, Plain)
        begin = self.begin if plain else []
        if len(begin) + len(ids) > self.max_length:
            if self.settings.too_long == "drop":
                raise LeftOut(TOO_LONG)
            ids, notes = ids[len(begin) + len(ids) - self.max_length :], (CUT,)
        others = {name: x for name, x in record.values.items() if name not in ("prompt", "messages")}
        left_out = {name: f"{why}; convert it to text" for name, why in not_json(others).items()}
        left_out |= {name: "an argument of theirs has this name; rename it" for name in ARGUMENTS if name in others}
        notes += tuple(NO_COLUMN.format(name=name, why=why) for name, why in left_out.items())
        columns = {name: x for name, x in others.items() if name not in left_out}
        given = (prompt.prompt, None) if isinstance(prompt, Plain) else (prompt.messages, prompt.tools)
        meta = {**dict(zip(("prompt", "tools"), given, strict=True)), "columns": columns}
        return [Example({"input_ids": [*begin, *ids]}, meta, notes)]


def _read(settings: RolloutSettings, record: Record) -> Plain | Conversation:
    """The prompt of a row. Raises RowError."""
    values = record.values
    if isinstance(values.get("prompt"), str) or "messages" not in values:
        if not isinstance(values.get("prompt"), list):
            text = require_text(values, "prompt")
            if settings.shape == "auto":
                return Plain(text, "")
            messages = [{"role": "user", "content": text}]
        else:
            messages = [as_message(m, i) for i, m in enumerate(require_list(values, "prompt"))]
    else:
        messages = [as_message(m, i) for i, m in enumerate(require_list(values, "messages"))]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] == "system":
        raise RowError("the prompt has no message of a user to respond to. Correct or remove the row.")
    return Conversation(with_system(messages, values, settings.system), tools_of(values))
