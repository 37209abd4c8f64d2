"""Rows with words and a tag for each; a sentence that is too long becomes several examples, split between words."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ptft_dist.data.encoder import EncoderContext, Example, LeftOut, RowError
from ptft_dist.data.formats import Record, json_type, text_problem
from ptft_dist.data.row_encoder import RowEncoder, require_list
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.tasks.common.frame import Frame
from ptft_dist.tasks.common.label_names import LabelNames
from ptft_dist.tasks.token_classification.settings import TAG_LETTERS, TokenClassificationSettings, inner_tag

if TYPE_CHECKING:
    from tokenizers import Encoding

SPLIT = "longer than data.max_length: split between two words"
CUT_WORD = "with one word longer than data.max_length: the word was truncated"
NO_TOKEN = "with a word that has no token: nothing is predicted for it"
_NO_LABEL = -100  # a token that counts nothing in the loss


class TaggedRows(RowEncoder):
    """Columns: input_ids, token_type_ids, and labels: a tag's id where a word begins, -100 elsewhere; with
    pieces: all, ids on every token of a word.

    meta of an example: sentence: the number of the sentence that it is a piece of; tags: of the piece's words; at: the
    position of each word's first token, null for a word without a token.
    """

    surveys = True
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
                f"data.max_length: {self.max_length} leaves no room beside {len(self.frame)} special tokens. Raise it."
            )
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        self.filler = eos if pad is None else pad
        if not context.tokenizer_learned and _spaces_matter(self.backend):
            logging.getLogger("ptft").warning(
                "tokenizer.path: this tokenizer gives a word after a space other tokens than the same word alone, and "
                "this task tokenizes words one by one. For a language with spaces, set add_prefix_space: true in its "
                "tokenizer_config.json."
            )

    @classmethod
    def check(cls, settings: TokenClassificationSettings, record: Record) -> None:
        super().check(settings, record)
        tokens, tags = require_list(record.values, "tokens"), require_list(record.values, "tags")
        if len(tokens) != len(tags):
            raise RowError(f"there are {len(tokens)} tokens and {len(tags)} tags. Each word needs one tag.")
        for i, (token, tag) in enumerate(zip(tokens, tags, strict=True), 1):
            if problem := text_problem("tokens", token):
                raise RowError(f"word {i}: {problem}")
            if not token:
                raise RowError(f"word {i} is empty. Remove it with its tag.")
            if not isinstance(tag, str) or not tag:
                held = "empty" if tag == "" else json_type(tag)
                raise RowError(
                    f"the tag of word {i} ({token!r}) is {held}; a tag is a name such as O or B-PER. Write names for "
                    "the numbers of a data set."
                )
            if problem := text_problem("tags", tag):
                raise RowError(f"the tag of word {i} ({token!r}): {problem}")
        if found := misplaced(settings.scheme, tags):
            i, why = found
            raise RowError(f"word {i + 1} ({tokens[i]!r}): {why}")

    @classmethod
    def texts(cls, settings: TokenClassificationSettings, record: Record) -> Iterator[str]:  # noqa: ARG003
        """Word by word, as the tokenizer will get them."""
        yield from record.values["tokens"]

    @classmethod
    def survey_of(cls, settings: TokenClassificationSettings, records: Iterable[Record]) -> dict[str, Any]:
        """labels: the tags in the order of their ids."""
        names = LabelNames("tag", "token_classification.labels")
        for record in records:
            names.add(record.values["tags"], record.where)
        if not settings.labels:
            names.check_distinct()
        seen = set(names.first)
        if settings.pieces == "all":
            seen |= {inner_tag(settings.scheme, tag) for tag in seen}
        labels = list(settings.labels or sorted(seen))
        if len(labels) < 2:
            raise DataError(
                f"data: the training rows have the tags {', '.join(labels) or '(none)'}; two or more are needed. Look "
                "at the tags, or name their column with fields: {tags: ...}."
            )
        return {"labels": labels}

    def pieces(self, record: Record) -> Sequence[Any]:
        if not record.values["tokens"]:
            raise LeftOut("without words")
        return [record.values["tokens"]]

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        tokens, tags = record.values["tokens"], record.values["tags"]
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
        found = {
            SPLIT: len(spans) > 1,
            CUT_WORD: max(map(len, words)) > self.room,
            NO_TOKEN: not all(words),
        }
        notes = tuple(note for note, holds in found.items() if holds)
        return [self.example(words[span.start : span.stop], tags[span.start : span.stop], notes) for span in spans]

    def spans(self, sizes: Sequence[int]) -> list[range]:
        """The words of each piece, as many as have room. sizes: of the words in tokens."""
        starts, filled = [0], 0
        for word, size in enumerate(sizes):
            if filled + size > self.room:
                starts.append(word)
                filled = 0
            filled += size
        return [range(a, b) for a, b in zip(starts, [*starts[1:], len(sizes)], strict=True)]

    def example(self, words: Sequence[Sequence[int]], tags: Sequence[str], notes: tuple[str, ...]) -> Example:
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
            "input_ids": input_ids or [self.filler],  # no network takes an empty row
            "token_type_ids": types or [0],
            "labels": [*[_NO_LABEL] * before, *labels, *[_NO_LABEL] * after] or [_NO_LABEL],
        }
        return Example(columns, {"tags": tags, "at": at}, notes)


def misplaced(scheme: str, tags: Sequence[str]) -> tuple[int, str] | None:
    """The first word whose tag does not fit the scheme, and why; None if all do."""
    if scheme == "plain":
        return None
    letters = TAG_LETTERS[scheme]
    before, kind_before = "O", ""
    for i, tag in enumerate([*tags, "O"]):
        letter, dash, kind = tag.partition("-")
        if tag != "O" and (letter not in letters or bool(dash) != bool(kind)):
            spelt = ", ".join(f"{letter}-TYPE" for letter in letters)
            return i, f"the tag {tag!r} is none of {spelt} and O. Look at token_classification.scheme ({scheme})."
        inside = before in ("B", "I") and kind == kind_before  # an entity of this type may go on here
        hint = f"In {scheme} {{}}. Correct the tags, or token_classification.scheme."
        if scheme == "iob2" and letter == "I" and not inside:
            return i, f"{tag} without a B-{kind} or I-{kind} before it. " + hint.format("entities begin with B-")
        if scheme == "iob1" and letter == "B" and not inside:
            why = "B- stands only where an entity of the same type has just ended"
            return i, f"{tag} without an entity of the same type before it. " + hint.format(why)
        if scheme == "bioes":
            if before in ("B", "I") and not (inside and letter in ("I", "E")):
                return i - 1, f"{tags[i - 1]} is not followed by I-{kind_before} or E-{kind_before}. " + hint.format(
                    "entities end with E-, and those of one word are S-"
                )
            if letter in ("I", "E") and not inside:
                return i, f"{tag} without a B-{kind} or I-{kind} before it. " + hint.format("entities begin with B-")
        before, kind_before = letter, kind
    return None


def _spaces_matter(backend: Any) -> bool:
    """Whether a word in a text becomes other tokens than the same word in a list of words."""
    listed = backend.encode(["and", "and"], is_pretokenized=True, add_special_tokens=False).ids
    return bool(listed != backend.encode("and and", add_special_tokens=False).ids)
