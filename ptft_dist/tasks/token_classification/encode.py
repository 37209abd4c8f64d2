"""Encodes rows with words and their tags. A sentence longer than data.max_length is split between words."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptft_dist.data.encoder import EncoderContext, Example, LeftOut, RowError
from ptft_dist.data.formats import Record, json_type, text_problem
from ptft_dist.data.row_encoder import RowEncoder, require_list
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.tasks.common.frame import Frame
from ptft_dist.tasks.common.label_names import LabelNames, class_name, in_order
from ptft_dist.tasks.token_classification.settings import TAG_LETTERS, TokenClassificationSettings, inner_tag

if TYPE_CHECKING:
    from tokenizers import Encoding

SPLIT = "longer than data.max_length: split between two words"
CUT_WORD = "with one word longer than data.max_length: the word was truncated"
NO_TOKEN = "with a word that has no token: nothing is predicted for it"
_NO_LABEL = -100  # ignored by the loss


class MadeUp(list[str]):
    """Tags in the place of an unknown answer. They follow no scheme."""


class TaggedRows(RowEncoder):
    """Encodes tagged words, one example per piece of a sentence.

    Columns:
        input_ids, token_type_ids: [T].
        labels: tag ids [T] at the first token of each word, -100 elsewhere; with pieces: all, at all tokens of a word.

    Meta of an example:
        sentence: number of its sentence.
        tags: the tags of its words.
        at: position of each word's first token, null for a word without a token.
    """

    surveys = True
    answer_roles = ("tags",)
    numbered = "sentence"
    columns = {"token_type_ids": "u1", "labels": "<i4"}
    pretokenized = True

    settings: TokenClassificationSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        self.ids = {tag: i for i, tag in enumerate(self.survey["labels"])}
        self.frame = Frame.of(self.tokenizer, self.backend, 1)
        self.room = self.max_length - len(self.frame)
        if self.room < 1:
            raise RecipeError(
                f"data.max_length: {self.max_length} leaves no room for a word beside {len(self.frame)} special "
                "tokens. Raise it."
            )
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        self.filler = eos if pad is None else pad
        if not context.tokenizer_learned and _spaces_matter(self.backend):
            logging.getLogger("ptft").warning(
                "tokenizer.path: this tokenizer encodes a word after a space differently than the same word alone, and "
                "this task tokenizes words one by one. For a language with spaces, set add_prefix_space: true in its "
                "tokenizer_config.json."
            )

    @classmethod
    def check(cls, settings: TokenClassificationSettings, record: Record) -> None:
        super().check(settings, record)
        tokens, tags = require_list(record.values, "tokens"), tag_names(settings, record)
        if len(tokens) != len(tags):
            raise RowError(f"there are {len(tokens)} tokens and {len(tags)} tags. Each word needs one tag.")
        for i, (token, tag) in enumerate(zip(tokens, tags, strict=True), 1):
            if problem := text_problem("tokens", token):
                raise RowError(f"word {i}: {problem}")
            if not token:
                raise RowError(f"word {i} is empty. Remove it with its tag.")
            if not isinstance(tag, str) or not tag:
                got = "empty" if tag == "" else json_type(tag)
                raise RowError(
                    f"the tag of word {i} ({token!r}) is {got}; a tag is a name such as O or B-PER. For tag "
                    "ids, set token_classification.label_names: {0: O, 1: B-PER, ...}."
                )
            if problem := text_problem("tags", tag):
                raise RowError(f"the tag of word {i} ({token!r}): {problem}")
        made_up = isinstance(record.values["tags"], MadeUp)
        if not made_up and (violation := misplaced(settings.scheme, tags)):
            i, why = violation
            raise RowError(f"word {i + 1} ({tokens[i]!r}): {why}")

    @classmethod
    def texts(cls, settings: TokenClassificationSettings, record: Record) -> Iterator[str]:  # noqa: ARG003
        """The words, which the tokenizer encodes one by one."""
        yield from record.values["tokens"]

    @classmethod
    def survey_of(
        cls,
        settings: TokenClassificationSettings,
        records: Iterable[Record],
        seed: int,  # noqa: ARG003
    ) -> dict[str, Any]:
        """The tags in the order of their ids, as `labels`."""
        names = LabelNames("tag", "token_classification.labels")
        for record in records:
            names.add(tag_names(settings, record), record.where, record.values["tags"])
        if not settings.labels:
            names.check_distinct()
        seen = set(names.first)
        if settings.pieces == "all":
            seen |= {inner_tag(settings.scheme, tag) for tag in seen}
        named = in_order(seen, settings.label_names, names.ids)
        if named and settings.pieces == "all":  # label_names may lack inner tags
            named = list(dict.fromkeys([*named, *(inner_tag(settings.scheme, tag) for tag in named)]))
        labels = list(settings.labels or named or sorted(seen))
        if len(labels) < 2:
            raise DataError(
                f"data: the training rows have the tags {', '.join(labels) or '(none)'}; two or more are needed. "
                "Correct the tags, or name their column with fields: {tags: ...}."
            )
        return {"labels": labels}

    @classmethod
    def unanswered(
        cls,
        settings: TokenClassificationSettings,  # noqa: ARG003
        survey: Mapping[str, Any],
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {**values, "tags": MadeUp(survey["labels"][:1] * len(require_list(values, "tokens")))}

    def pieces(self, record: Record) -> Sequence[Any]:
        if not record.values["tokens"]:
            raise LeftOut("without words")
        return [record.values["tokens"]]

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        tokens, tags = record.values["tokens"], tag_names(self.settings, record)
        for i, tag in enumerate(tags):
            if tag not in self.ids:
                raise RowError(
                    f"word {i + 1} ({tokens[i]!r}): the tag {tag!r} is none of {', '.join(self.ids)}. Correct it, or "
                    "list all tags in token_classification.labels."
                )
        words: list[list[int]] = [[] for _ in tokens]
        for token, word in zip(encodings[0].ids, encodings[0].word_ids, strict=True):
            assert word is not None  # only special tokens belong to no word
            words[word].append(token)
        spans = self.spans([min(len(word), self.room) for word in words])
        conditions = {
            SPLIT: len(spans) > 1,
            CUT_WORD: max(map(len, words)) > self.room,
            NO_TOKEN: not all(words),
        }
        notes = tuple(note for note, holds in conditions.items() if holds)
        return [self.example(words[span.start : span.stop], tags[span.start : span.stop], notes) for span in spans]

    def spans(self, sizes: Sequence[int]) -> list[range]:
        """The words of each piece: as many as fit. sizes: number of tokens of each word."""
        starts, filled = [0], 0
        for word, size in enumerate(sizes):
            if filled + size > self.room:
                starts.append(word)
                filled = 0
            filled += size
        return [range(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]

    def example(self, words: Sequence[Sequence[int]], tags: Sequence[str], notes: tuple[str, ...]) -> Example:
        """The example of one piece. words: token ids of each word."""
        settings = self.settings
        ids: list[int] = []
        labels: list[int] = []
        at: list[int | None] = []
        before, after = len(self.frame.ids[0]), len(self.frame.ids[1])
        for word, tag in zip(words, tags, strict=True):
            at.append(before + len(ids) if word else None)
            kept = word[: self.room]
            later = self.ids[inner_tag(settings.scheme, tag)] if settings.pieces == "all" else _NO_LABEL
            ids += kept
            labels += [self.ids[tag], *[later] * (len(kept) - 1)] if kept else []
        input_ids, types = self.frame.fill(ids)
        columns = {
            "input_ids": input_ids or [self.filler],  # networks reject empty rows
            "token_type_ids": types or [0],
            "labels": [*[_NO_LABEL] * before, *labels, *[_NO_LABEL] * after] or [_NO_LABEL],
        }
        return Example(columns, {"tags": tags, "at": at}, notes)


def tag_names(settings: TokenClassificationSettings, record: Record) -> list[Any]:
    """The tags of a row, with names for those that the data have as numbers. Raises RowError if there is no list."""
    return [class_name(tag, settings.label_names) for tag in require_list(record.values, "tags")]


def misplaced(scheme: str, tags: Sequence[str]) -> tuple[int, str] | None:
    """The first word whose tag violates the scheme, and why; None if all tags are valid."""
    if scheme == "plain":
        return None
    prefixes = TAG_LETTERS[scheme]
    begin, inner, *ends = prefixes
    previous_prefix, previous_type = "O", ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, dash, entity_type = tag.partition("-")
        if tag != "O" and (prefix not in prefixes or bool(dash) != bool(entity_type)):
            valid = ", ".join(f"{prefix}-TYPE" for prefix in prefixes)
            return (
                i,
                f"the tag {tag!r} is none of {valid} and O. Correct it, or token_classification.scheme ({scheme}).",
            )
        inside = previous_prefix in (begin, inner) and entity_type == previous_type  # continues an entity of this type
        hint = f"In {scheme} {{}}. Correct the tags, or token_classification.scheme."
        no_start = f"{tag} without a B-{entity_type} or {inner}-{entity_type} before it. " + hint.format(
            "entities begin with B-"
        )
        if scheme == "iob2" and prefix == "I" and not inside:
            return i, no_start
        if scheme == "iob1" and prefix == "B" and not inside:
            why = "B- is used only directly after an entity of the same type"
            return i, f"{tag} without an entity of the same type before it. " + hint.format(why)
        if ends:
            end, single = ends
            if previous_prefix in (begin, inner) and not (inside and prefix in (inner, end)):
                expected = f"{inner}-{previous_type} or {end}-{previous_type}"
                why = f"entities end with {end}-, and entities of one word are {single}-"
                return i - 1, f"{tags[i - 1]} is not followed by {expected}. " + hint.format(why)
            if prefix in (inner, end) and not inside:
                return i, no_start
        previous_prefix, previous_type = prefix, entity_type
    return None


def _spaces_matter(backend: Any) -> bool:
    """Whether the tokenizer encodes a word of a text differently than the same word of a list."""
    listed = backend.encode(["and", "and"], is_pretokenized=True, add_special_tokens=False).ids
    return bool(listed != backend.encode("and and", add_special_tokens=False).ids)
