"""Prompts with examples, and their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ptft_dist.data.encoder import LeftOut, RowError
from ptft_dist.data.formats import text_problem
from ptft_dist.data.row_encoder import require
from ptft_dist.data.tokenizer import added_around
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.common.chat_template import ChatTemplate, TemplateRefused, check_nothing_lost
from ptft_dist.tasks.prompting.settings import PromptingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOO_LONG = "longer than data.max_length"


class Shot(NamedTuple):
    """An example before the row."""

    prompt: str
    answer: str


def filled(settings: PromptingSettings, values: Mapping[str, Any]) -> str:
    """The template with the values of a row. Raises RowError if one is missing, empty, or neither text nor number."""
    return settings.template.format_map({name: _written(values, name) for name in settings.columns})


def _written(values: Mapping[str, Any], name: str) -> str:
    value = require(values, name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if problem := text_problem(name, value):
        raise RowError(problem)
    if not value.strip():
        raise RowError(f"the field {name!r} is empty. Fill it in, or remove the row.")
    return str(value)


class Prompts:
    """Puts examples before prompts, and splits a prompt with its answers into tokens.

    A prompt with labels is split as lm-eval's HFLM does it, so log-likelihoods are equal: white space at the end of the
    prompt belongs to the answer, prompt and answer are tokenized together, and the answer is what follows the tokens of
    the prompt alone.
    """

    def __init__(
        self, settings: PromptingSettings, tokenizer: PreTrainedTokenizerBase, shots: Sequence[Sequence[str]]
    ) -> None:
        """shots: prompt and answer of each example. Raises RecipeError if the tokenizer has no chat template."""
        if settings.chat and not tokenizer.chat_template:
            raise RecipeError(
                "prompting.chat: this tokenizer has no chat template. Remove the key, or use a model with one"
            )
        self.settings, self.shots = settings, [Shot(*shot) for shot in shots]
        self.template = ChatTemplate(tokenizer, "prompting", with_spans=False) if settings.chat else None
        # The chat template writes BOS itself.
        self.begin = [] if settings.chat else added_around(tokenizer)[0]

    def text(self, prompt: str) -> str:
        """Examples and prompt as one text. An example with the same prompt is left out, because it has the answer.

        Raises:
            RowError: the chat template refuses the prompt.
        """
        shots = self.used(prompt)
        if self.template is None:
            return self.settings.separator.join([*(shot.prompt + shot.answer for shot in shots), prompt])
        messages = [
            {"role": role, "content": text}
            for shot in shots
            for role, text in (("user", shot.prompt), ("assistant", shot.answer))
        ]
        messages.append({"role": "user", "content": prompt})
        try:
            text = self.template.text(messages, None, prompt=True)
            check_nothing_lost(messages, None, text)
        except TemplateRefused as why:
            raise RowError(f"{why}.") from None
        return text

    def used(self, prompt: str) -> list[Shot]:
        """The examples before a prompt."""
        return [shot for shot in self.shots if shot.prompt != prompt]

    def pieces(self, prompt: str, answers: Sequence[str]) -> list[str]:
        """The texts to tokenize: the prompt, and the prompt with each answer."""
        text = self.text(prompt)
        # A generated text begins after the prompt's last line break.
        context = text.rstrip() if self.settings.labels is not None else text.rstrip(" ")
        return [context, *(text + answer for answer in answers)]

    def columns(self, pieces: Sequence[Sequence[int]], answers: Sequence[str], max_length: int) -> dict[str, Any]:
        """The columns of a row with K answers and S sequences.

        input_ids are S sequences one after the other, `lengths` [S] their numbers of tokens. A sequence is the prompt
        with an answer except for its last token, so answers of one token share one. `prompt` [1] is the number of the
        prompt's tokens. `answers` are the tokens of all K answers, `answer_lengths` [K] their numbers, `sequences` [K]
        the sequence of each, and `bytes` [K] their sizes.

        Args:
            pieces: the tokens of `pieces`.
            max_length: of a prompt with an answer.

        Raises:
            RowError: an answer has no token of its own.
            LeftOut: the row is longer than max_length.
        """
        context = [*self.begin, *pieces[0]]
        ends = [list(piece[len(pieces[0]) :]) for piece in pieces[1:]]
        for answer, end in zip(answers, ends, strict=True):
            if not end or not context:
                raise RowError(
                    f"the tokenizer gives the {'prompt' if end else 'answer'} no token of its own: {answer!r}. End "
                    "prompting.template with other characters, such as a colon, or begin the answer with a space."
                )
            if len(context) + len(end) > max_length:
                raise LeftOut(TOO_LONG)
        sequences = list(dict.fromkeys((*context, *end[:-1]) for end in ends))
        return {
            "input_ids": [i for sequence in sequences for i in sequence],
            "lengths": [len(sequence) for sequence in sequences],
            "prompt": [len(context)],
            "answers": [i for end in ends for i in end],
            "answer_lengths": [len(end) for end in ends],
            "sequences": [sequences.index((*context, *end[:-1])) for end in ends],
            "bytes": [len(answer.encode()) for answer in answers],
        }
