"""Chat templates: selecting one, and rendering a conversation with the spans of text that are learned."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptft_dist.config.places import expanded
from ptft_dist.data.cleaning.texts import REASONING
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.common.chat_settings import CHATML as CHATML_TOKENS
from ptft_dist.tasks.common.chat_settings import ChatSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""[start, end) in characters."""

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- 'Tools:' }}
    {%- for tool in tools %}
        {{- '\\n' }}{{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content or '' }}
            {%- for call in message.tool_calls or [] %}
                {{- '<tool_call>' }}{{- (call.function or call) | tojson }}{{- '</tool_call>' }}
            {%- endfor %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
"""ChatML with {% generation %} markers around the assistant's turns, each including its <|im_end|>."""


_LIBRARY_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)
"""Errors that an expression in a template can raise, besides Jinja's own. A too large range() raises OverflowError. An
{% include %} raises TypeError, because no loader is set."""

_THINK = re.compile("</?think>")


def missing_template(tokenizer: PreTrainedTokenizerBase, section: str) -> str:
    """The message for a tokenizer without a chat template, with the settings to add; empty if it has one.

    section: the task's section in the recipe.
    """
    if tokenizer.chat_template:
        return ""
    add = [token for token in CHATML_TOKENS if token not in tokenizer.get_vocab()]
    steps = [f"{section}.template: chatml"] + ([f"tokenizer.add: {add}"] if add else [])
    return (
        f"{section}.template: this tokenizer has no chat template, and rows with turns need one. Set in the recipe:\n  "
        + "\n  ".join(steps)
        + f"\nThe end of a turn is then {CHATML_TOKENS[1]}, which is learned and ends generated texts. Any other "
        "template that TRL knows by name, or a .jinja file, needs its own special tokens in tokenizer.add."
    )


def missing_end_of_turn(tokenizer: PreTrainedTokenizerBase, template: str, section: str) -> str:
    """The remedy for a template whose turns do not end with a special token."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    add = [token for token in dict.fromkeys(re.findall(r"<\|\w+\|>", template)) if token not in special]
    if add:
        return f"Add the template's tokens to the tokenizer: tokenizer.add: {add}."
    return (
        "Put the token that ends a turn inside the template's {% generation %} markers; if it is not a special token "
        f"of the tokenizer, add it with tokenizer.add. Or use another template, such as {section}.template: chatml."
    )


def saved_template(settings: ChatSettings, base: Path, *, learned: bool) -> str | None:
    """The template to save with the tokenizer; None: keep its own.

    Args:
        base: the directory where relative paths start.
        learned: the tokenizer is trained in this run.

    Raises:
        RecipeError: there is no such template.
    """
    name = settings.template
    if name is None:
        return CHATML if learned else None
    if name == "chatml":
        return CHATML
    if "/" in name or name.endswith((".jinja", ".j2", ".txt")):
        path = base / expanded(name)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(
                f"{settings.section}.template: {path} cannot be read ({error}). Paths are relative to the recipe."
            ) from None
    known = trl_templates()
    if name not in known:
        raise RecipeError(
            f"{settings.section}.template: unknown template {name!r}. Use one of chatml, {', '.join(known)}, or a "
            ".jinja file"
        )
    return known[name].read_text(encoding="utf-8")


def trl_templates() -> dict[str, Path]:
    """The chat templates in the TRL package, by name. TRL is not imported, because that is slow."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))) / "chat_templates"
    names = sorted(path.name.removesuffix(".jinja") for path in folder.glob("*.jinja"))
    return {name: folder / f"{name}.jinja" for name in names if not name.endswith("_training")}


class TemplateRefused(Exception):
    """The template cannot render this conversation; the text says why."""


@dataclass(frozen=True)
class Rendered:
    """A conversation rendered as text."""

    text: str
    spans: list[Span]
    """[start, end) of the assistant's turns, including the token that ends each turn."""


class ChatTemplate:
    """Renders conversations with a tokenizer's template.

    {% generation %} markers give the assistant's spans: those of the template, or of TRL's training variant of it. A
    template without markers is rendered turn by turn. It must then render each prefix of a conversation independently
    of the messages that follow.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, section: str, *, with_spans: bool = True) -> None:
        """Take the tokenizer's template.

        Args:
            section: the task's section in the recipe, for messages.
            with_spans: `render` is used. False: `text` only; the template stays the tokenizer's own.

        Raises:
            RecipeError: the tokenizer has no template.
        """
        if missing := missing_template(tokenizer, section):
            raise RecipeError(missing)
        self.section = section
        template = tokenizer.chat_template
        self.template: str = template["default"] if isinstance(template, dict) else template
        self.special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self.marked = False
        if with_spans:
            self._find_markers(tokenizer)

    def _find_markers(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take TRL's training variant of a template without markers."""
        from jinja2 import TemplateError
        from trl.chat_template_utils import get_training_chat_template, has_generation_markers

        self.marked = has_generation_markers(self.template)
        if not self.marked:
            # TRL does not know the template (ValueError), or the template fails in TRL's trial: render() reports it.
            with contextlib.suppress(TemplateError, *_LIBRARY_ERRORS):
                self.template, self.marked = get_training_chat_template(tokenizer) or self.template, True

    def render(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None) -> Rendered:
        """Render a conversation as text with the assistant's spans.

        Raises:
            TemplateRefused: the template raises an error, or drops a message, a tool or a call.
        """
        if self.marked:
            text, spans = self._text(messages, tools, marked=True)
            spans = _turns(spans, sum(message["role"] == "assistant" for message in messages))
        else:
            text, _ = self._text(messages, tools)
            spans = self._turn_by_turn(messages, tools, text)
        check_nothing_lost(messages, tools, text)
        if not spans:
            raise TemplateRefused("the chat template does not render the assistant's messages")
        return Rendered(text, spans)

    def text(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, *, prompt: bool = False) -> str:
        """The conversation as text. prompt: ends with the beginning of an assistant's turn.

        Raises:
            TemplateRefused: the template raises an error.
        """
        return self._text(messages, tools, prompt=prompt)[0]

    def _text(
        self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, *, marked: bool = False, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # its return annotation is wrong: it returns two lists
        try:
            texts, indices = render(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=prompt,
                **self.special,
            )
        except (TemplateError, *_LIBRARY_ERRORS) as error:
            if isinstance(error, TemplateError | TypeError | ValueError):
                why = str(error)
            else:
                why = f"{type(error).__name__} {error}".rstrip()
            raise TemplateRefused(f"the chat template refuses this conversation: {why}") from None
        return texts[0], [(start, end) for start, end in indices[0] if start < end] if marked else []

    def _turn_by_turn(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, text: str) -> list[Span]:
        """The assistant's spans, by comparing renderings that end before and after each of its messages."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._text(messages[:i], tools, prompt=True)[0]
                after = self._text(messages[: i + 1], tools)[0]
                if not (after.startswith(before) and text.startswith(after)):
                    raise TemplateRefused(
                        "the chat template has no {% generation %} markers, and its rendering of a turn depends on the "
                        f"turns that follow, so the assistant's text cannot be located: set {self.section}.template to "
                        "a template with markers"
                    )
                spans.append((len(before), len(after)))
        return spans


def _turns(spans: list[Span], count: int) -> list[Span]:
    """The spans of `count` turns: adjacent spans are one if there are more. Phi-3 marks the EOS at the end itself."""
    if len(spans) <= count:
        return spans
    turns = spans[:1]
    for start, end in spans[1:]:
        if start == turns[-1][1]:
            turns[-1] = (turns[-1][0], end)
        else:
            turns.append((start, end))
    return turns


def check_nothing_lost(messages: Sequence[dict[str, Any]], tools: list[Any] | None, text: str) -> None:
    """Check that the template rendered every message, tool and call, and the reasoning of the last message.

    Raises:
        TemplateRefused: one is missing in the text.
    """
    for message in messages:
        content = _split(message)[1].strip()
        # Templates may remove the reasoning of earlier messages, and change the format of tool results.
        if content and message["role"] != "tool" and content not in text:
            raise TemplateRefused(f"the chat template drops this {message['role']} message: {content[:60]!r}")
        for call in message.get("tool_calls") or ():
            if call["function"]["name"] not in text:
                raise TemplateRefused(f"the chat template drops the call of {call['function']['name']}")
    for tool in tools or ():
        name = tool.get("function", tool).get("name", "") if isinstance(tool, dict) else ""
        if name not in text:
            raise TemplateRefused(f"the chat template drops the tool {name}")
    for message in messages[-1:]:
        for thought in [*_THINK.split(_split(message)[0]), *(message.get(key) or "" for key in REASONING)]:
            if thought.strip() not in text:
                raise TemplateRefused(
                    f"the chat template drops the reasoning of the last message: {thought.strip()[:60]!r}; use a "
                    "template that renders it, or remove it from the row"
                )


def _split(message: Mapping[str, Any]) -> tuple[str, str]:
    """The reasoning in the content of an assistant's message, and the rest of its content."""
    content = message.get("content") or ""
    if message["role"] != "assistant":
        return "", content
    reasoning, _, rest = content.rpartition("</think>")
    return reasoning, rest
