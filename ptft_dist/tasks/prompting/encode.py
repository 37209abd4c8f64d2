"""Encodes rows for prompting, and chooses the examples before them."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptft_dist.data.encoder import EncoderContext, Example, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.row_encoder import RowEncoder, require, require_text
from ptft_dist.data.tokenizer import after_answer
from ptft_dist.errors import DataError
from ptft_dist.tasks.common.chat import Plain
from ptft_dist.tasks.common.control_tokens import ControlTokens
from ptft_dist.tasks.common.label_names import check_known, label_name
from ptft_dist.tasks.prompting.prompts import Prompts, filled
from ptft_dist.tasks.prompting.settings import PromptingSettings

if TYPE_CHECKING:
    from tokenizers import Encoding

FEWER = "with one example less, because it is itself one of prompting.shots"


class PromptedRows(RowEncoder):
    """Encodes the prompt of a row with the text of every label, or with its target. Columns: see `Prompts.columns`, and
    `label`: the id of the row's label, or 0."""

    surveys = True
    survey_of_recipe = True
    answer_roles = ("label", "target")
    libraries = ("transformers",)  # it renders the chat template
    columns = {
        "lengths": "<i4",
        "prompt": "<i4",
        "answers": "token",
        "answer_lengths": "<i4",
        "sequences": "<i4",
        "bytes": "<i4",
        "label": "<i4",
    }

    settings: PromptingSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        self.backend.encode_special_tokens = not self.settings.chat  # those of the chat template are control tokens
        self.prompts = Prompts(self.settings, self.tokenizer, self.survey["shots"])
        self.control = ControlTokens(self.tokenizer)
        if self.settings.chat:
            for shot in self.prompts.shots:
                try:
                    self.control.check_texts(Plain(*shot))
                except RowError as problem:
                    raise DataError(f"data: an example of prompting.shots: {problem}") from None
            if special := self.control.of(after_answer(self.tokenizer)):
                self.discovered = {"end_of_turn": special[0]}

    @classmethod
    def check(cls, settings: PromptingSettings, record: Record) -> None:
        filled(settings, record.values)
        _answer(settings, record)

    @classmethod
    def texts(cls, settings: PromptingSettings, record: Record) -> Iterator[str]:
        yield filled(settings, record.values) + _answer(settings, record)

    @classmethod
    def survey_of(cls, settings: PromptingSettings, records: Iterable[Record], seed: int) -> dict[str, Any]:
        """The examples as `shots`: [prompt, answer]; and the names of the `labels`, if there are any.

        The labels take turns. Each gives its rows with the smallest hashes of (seed, row): first the first row of every
        label, ordered by hash, then the second ones. So N examples are the first N of any larger number.

        Raises:
            DataError: there are fewer different rows.
        """
        survey: dict[str, Any] = {} if settings.labels is None else {"labels": list(settings.labels)}
        best: dict[str, dict[str, tuple[int, str, str]]] = {}  # label -> prompt -> hash, prompt, answer
        for record in records if settings.shots else ():
            prompt, answer = filled(settings, record.values), _answer(settings, record)
            digest = hashlib.blake2b(f"{seed}\n{cls.key(record)}".encode(), digest_size=8).digest()
            of_label = best.setdefault(answer if settings.labels else "", {})
            of_label[prompt] = min(of_label.get(prompt, (2**64, "", "")), (int.from_bytes(digest), prompt, answer))
            if len(of_label) > 2 * settings.shots + 100:
                smallest = heapq.nsmallest(settings.shots, of_label.values())
                best[answer if settings.labels else ""] = {each[1]: each for each in smallest}
        ranked = [
            (rank, each)
            for of_label in best.values()
            for rank, each in enumerate(heapq.nsmallest(settings.shots, of_label.values()))
        ]
        chosen = [each for _, each in heapq.nsmallest(settings.shots, ranked)]
        if len(chosen) < settings.shots:
            raise DataError(
                f"prompting.shots: {settings.shots} examples are wanted, and the training rows have {len(chosen)} "
                "different ones. Lower it, or add rows to data.train."
            )
        return {**survey, "shots": [[prompt, answer] for _, prompt, answer in chosen]}

    @classmethod
    def unanswered(
        cls,
        settings: PromptingSettings,
        survey: Mapping[str, Any],  # noqa: ARG003
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {**values, settings.answer_role: "." if settings.labels is None else next(iter(settings.labels))}

    def _answers(self, record: Record) -> list[str]:
        labels = self.settings.labels
        return [record.values["target"]] if labels is None else list(labels.values())

    def pieces(self, record: Record) -> Sequence[Any]:
        prompt = filled(self.settings, record.values)
        if self.settings.chat:
            self.control.check_texts(Plain(prompt, ""))
        return self.prompts.pieces(prompt, self._answers(record))

    def encode(self, pieces: Sequence[Any]) -> list[Encoding]:
        return self.backend.encode_batch_fast(list(pieces), add_special_tokens=False)

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        answers, labels = self._answers(record), self.settings.labels
        columns = self.prompts.columns([encoding.ids for encoding in encodings], answers, self.max_length)
        prompt = filled(self.settings, record.values)
        notes = (FEWER,) if len(self.prompts.used(prompt)) < len(self.prompts.shots) else ()
        if labels is None:
            return [Example({**columns, "label": 0}, {"source": prompt, "reference": answers[0]}, notes)]
        name = label_name(record.values["label"])
        return [Example({**columns, "label": list(labels).index(name)}, {"text": prompt, "label": name}, notes)]


def _answer(settings: PromptingSettings, record: Record) -> str:
    """The text that answers the prompt of a row. Raises RowError."""
    if settings.labels is None:
        return require_text(record.values, "target")
    name = label_name(require(record.values, "label"))
    check_known([name], settings.labels, "prompting.labels")
    return settings.labels[name]
