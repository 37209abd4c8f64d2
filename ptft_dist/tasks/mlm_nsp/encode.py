"""Documents into pairs of segments, for next-sentence prediction (Devlin et al. 2019).

Two passes. The sentences become token ids, in files beside the store that is being built; then pairs are cut out of
them through memory maps, so that memory does not grow with the corpus.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptft_dist.data.encoder import EncoderContext, Example, Outcome, Side
from ptft_dist.data.example_store import ExampleStore, ExampleWriter
from ptft_dist.data.formats import Document
from ptft_dist.data.report import Notes
from ptft_dist.data.store import DOCUMENTS, TOKENS, Int64Stream, StoreWriter
from ptft_dist.data.tokenizer import DocumentEncoder
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.tasks.common.documents import EMPTY, Documents
from ptft_dist.tasks.mlm_nsp.settings import MlmNspSettings

FOLLOWS, UNRELATED = 0, 1  # as BERT's head counts
_SPECIAL = 3  # [CLS] A [SEP] B [SEP]
_TRIES = 100
# A full stop before a space, or a Chinese one anywhere, with the closing quotes and brackets after it; or a line's end.
_END = re.compile(
    "[.!?]+[\"')\\]\u00bb\u2019\u201d]*(?=\\s)|[\u3002\uff01\uff1f]+[\"')\\]\u2019\u201d\u300d\u300f\uff09]*|\n"
)


def split_sentences(text: str, kind: str) -> list[str]:
    """The sentences of a text, without the space around them. kind: `line` or `punctuation`, as mlm_nsp.sentence."""
    if kind == "line":
        pieces = text.splitlines()
    else:
        cuts = [0, *(match.end() for match in _END.finditer(text)), len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    return [piece.strip() for piece in pieces if piece.strip()]


class PairRows(Documents):
    """Each document becomes its sentences' token ids; the writer cuts pairs out of all of them."""

    store = ExampleStore
    settings: MlmNspSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        if self.max_length < _SPECIAL + 2:
            raise RecipeError(
                f"data.max_length: {self.max_length} is too short; a pair needs at least {_SPECIAL + 2} tokens."
            )
        self.seed = context.seed
        self.encoder = DocumentEncoder(self.tokenizer, ("cls", "sep"))

    def encode(self, documents: Sequence[Document]) -> list[Outcome]:
        """Sentences without a token are left out."""
        sentences = [[Document(s, d.where) for s in split_sentences(d.text, self.settings.sentence)] for d in documents]
        ids = iter(self.encoder.encode([sentence for each in sentences for sentence in each]))
        return [
            self._outcome(document, [one[1:-1] for one in (next(ids) for _ in each) if one])
            for document, each in zip(documents, sentences, strict=True)
        ]

    def _outcome(self, document: Document, sentences: list[list[int]]) -> Outcome:
        if not sentences:
            return Outcome(dropped=EMPTY)
        unknown_id = self.encoder.unknown_id
        unknown = 0 if unknown_id is None else sum(ids.count(unknown_id) for ids in sentences)
        return Outcome([Example({"sentences": sentences, "text": text_hash(document.text)})], unknown_tokens=unknown)

    def writer(self, path: Path, side: Side) -> PairWriter:
        return PairWriter(self, path, side)


def text_hash(text: str) -> int:
    """Equal for documents with the same text, white space around it apart; fits into int64."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "big", signed=True)


class PairWriter:
    """Gathers the sentences of one side in files, then writes every document's pairs.

    The store's columns: input_ids [CLS] A [SEP] B [SEP], token_type_ids (1: B [SEP]), next (0: B follows A, 1: it is
    from another document). Pairs are drawn from (seed, side, duplicate, document).
    """

    def __init__(self, encoder: PairRows, path: Path, side: Side) -> None:
        self._encoder, self._path, self._side = encoder, path, side
        self._counts = Notes()
        self.notes = self._counts.entries
        self._folder = path.with_name(f"{path.name}.sentences")
        self._sentences = SentenceWriter(self._folder, encoder.encoder.vocab_size)

    def add(self, example: Example) -> None:
        self._sentences.add(example.columns["text"], example.columns["sentences"])

    def close(self) -> dict[str, Any]:
        """
        Raises:
            DataError: there are fewer than two different documents, or none of two sentences.
        """
        sentences = self._sentences.close()
        _check_documents(self._side, sentences)
        dtypes = {"input_ids": sentences.tokens.dtype.str, "token_type_ids": "u1", "next": "u1"}
        store = ExampleWriter(self._path, dtypes, max_length=self._encoder.max_length)
        rows = itertools.count()
        for pair in self._pairs(sentences):
            store.add(self._columns(pair, f"{self._side} row {next(rows)}"))
        shutil.rmtree(self._folder)
        return store.close()

    def _pairs(self, sentences: Sentences) -> Iterator[Pair]:
        settings = self._encoder.settings
        cutter = Cutter(sentences, self._encoder.max_length - _SPECIAL, settings.short_probability)
        for duplicate in range(settings.duplicates):
            for document in range(len(sentences)):
                key = (self._encoder.seed, int(self._side == "validation"), duplicate, document)
                yield from cutter.pairs(document, np.random.default_rng(key))

    def _columns(self, pair: Pair, where: str) -> dict[str, Any]:
        first, second = pair.fitted(self._encoder.max_length - _SPECIAL)
        if len(first) + len(second) < len(pair.first) + len(pair.second):
            self._counts.add("truncated at their outer ends", where)
        self._counts.add("with a random second segment" if pair.unrelated else "with the segment that follows", where)
        tokenizer = self._encoder.tokenizer
        cls, sep = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
        return {
            "input_ids": np.concatenate((cls, first, sep, second, sep)),
            "token_type_ids": np.repeat([0, 1], [len(first) + 2, len(second) + 1]),
            "next": UNRELATED if pair.unrelated else FOLLOWS,
        }


def _check_documents(side: Side, sentences: Sentences) -> None:
    """Raises DataError if there is no other document to draw from, or no segment that follows another."""
    remedy = "Give more documents" + ", or a larger share (data.validation)" * (side == "validation")
    if len(sentences) and bool((sentences.texts == sentences.texts[0]).all()):
        raise DataError(
            f"data: {side} has one document (or several with the same text), and half of the pairs take their second "
            f"segment from another one. {remedy}, or cut them smaller (document: paragraph)."
        )
    if len(sentences) and bool((np.diff(sentences.firsts) == 1).all()):
        raise DataError(
            f"data: {side} has no document of two sentences, so no segment follows another. {remedy}, larger ones, or "
            "correct mlm_nsp.sentence; or take task: mlm."
        )


class SentenceWriter:
    """The sentences of one side, as a stream.

    A token store whose documents are the sentences, and beside it firsts.npy, int64 [D + 1], each document's first
    sentence and at the end their number, and texts.npy, int64 [D], a hash of each document's text.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._path, self._count = path, 0
        self._store = StoreWriter(path, vocab_size=vocab_size, max_length=2**40, packing=True)
        self._firsts, self._texts = Int64Stream(path / "firsts.npy"), Int64Stream(path / "texts.npy")

    def add(self, text: int, sentences: list[list[int]]) -> None:
        """text: `text_hash` of the document."""
        self._firsts.append(self._count)
        self._texts.append(text)
        for ids in sentences:
            self._store.add(ids)
        self._count += len(sentences)

    def close(self) -> Sentences:
        self._firsts.append(self._count)
        self._firsts.close()
        self._texts.close()
        dtype = self._store.close()["dtype"]
        size = (self._path / TOKENS).stat().st_size  # an empty file cannot be mapped
        return Sentences(
            np.asarray(np.memmap(self._path / TOKENS, dtype=dtype, mode="r")) if size else np.empty(0, dtype),
            *(np.asarray(np.load(self._path / name, mmap_mode="r")) for name in (DOCUMENTS, "firsts.npy", "texts.npy")),
        )


@dataclass(frozen=True)
class Sentences:
    """The sentences of one side, memory-mapped."""

    tokens: np.ndarray
    """[T]: all sentences, end to end."""
    starts: np.ndarray
    """int64 [S + 1]: where each sentence begins in tokens, and at the end T."""
    firsts: np.ndarray
    """int64 [D + 1]: each document's first sentence, and at the end S."""
    texts: np.ndarray
    """int64 [D]: a hash of each document's text."""

    def __len__(self) -> int:
        """The number of documents."""
        return len(self.texts)

    def ids(self, first: int, end: int) -> np.ndarray:
        """The tokens of the sentences from `first` to before `end`."""
        return self.tokens[self.starts[first] : self.starts[end]]

    def reach(self, first: int, last: int, length: int) -> int:
        """Where the fewest sentences from `first` on end that have `length` tokens together; at most at `last`."""
        found = np.searchsorted(self.starts[first : last + 1], self.starts[first] + length)
        return min(first + int(found), last)

    def near(self, first: int, last: int, length: int) -> int:
        """As `reach`, or one sentence less if that comes closer to the length."""
        end = self.reach(first, last, length)
        less, more = (int(self.starts[i] - self.starts[first]) for i in (end - 1, end))
        return end - 1 if less and length - less < more - length else end


@dataclass(frozen=True)
class Pair:
    """Two segments; `unrelated`: the second does not follow the first."""

    first: np.ndarray
    second: np.ndarray
    unrelated: bool

    def fitted(self, room: int) -> tuple[np.ndarray, np.ndarray]:
        """Both, `room` tokens together at most: the longer one is cut until they are equal. The first loses its
        beginning and the second its end, so that the seam between them stays."""
        second = self.second[: max(room - len(self.first), room // 2)]
        return self.first[-(room - len(second)) :], second


class Cutter:
    """Cuts documents into pairs, half of them with an unrelated second segment."""

    def __init__(self, sentences: Sentences, room: int, short_probability: float) -> None:
        self.sentences, self.room, self.short_probability = sentences, room, short_probability
        self.owed = 0  # forced negatives so far; the same number of later pairs is forced positive

    def pairs(self, document: int, random: np.random.Generator) -> Iterator[Pair]:
        """Sentences are gathered up to the room, or a random shorter length, and cut into two segments. Sentences that
        a random segment displaces are used again; nothing follows the last sentence of a document."""
        at, last = (int(x) for x in self.sentences.firsts[document : document + 2])
        while at < last:
            short = random.random() < self.short_probability
            target = int(random.integers(2, self.room + 1)) if short else self.room
            end = max(self.sentences.reach(at, last, target), min(at + 2, last))
            middle = at + int(random.integers(1, max(end - at, 2)))
            first, follows = self.sentences.ids(at, middle), self.sentences.ids(middle, end)
            unrelated = self._unrelated(len(follows) > 0, random)
            if unrelated:
                length = len(follows) or max(target - len(first), 1)
                yield Pair(first, self._elsewhere(document, length, follows, random), True)
            else:
                yield Pair(first, follows, False)
            at = middle if unrelated else end

    def _unrelated(self, free: bool, random: np.random.Generator) -> bool:
        if free and not self.owed:
            return bool(random.random() < 0.5)
        self.owed += -1 if free else 1
        return not free

    def _elsewhere(self, document: int, length: int, displaced: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Sentences of another document, about `length` tokens if it has as many: neither their place in the document
        nor their length tells that they are unrelated. They differ from what they displace."""
        sentences = self.sentences
        for _ in range(_TRIES):
            other = self._other(document, random)
            first, last = (int(x) for x in sentences.firsts[other : other + 2])
            starts = sentences.starts[first : last + 1]
            choices = int(np.searchsorted(starts, starts[-1] - length, side="right"))
            at = first + int(random.integers(max(choices, 1)))
            found = sentences.ids(at, sentences.near(at, last, length))
            both = min(len(found), len(displaced))
            if not both or not np.array_equal(found[:both], displaced[:both]):
                break
        return found

    def _other(self, document: int, random: np.random.Generator) -> int:
        """A document with another text."""
        texts = self.sentences.texts
        for _ in range(_TRIES):
            other = int(random.integers(len(texts)))
            if texts[other] != texts[document]:
                return other
        # Nearly all have the same text: take the next other one. `_check_documents` made sure that there is one.
        after = itertools.chain(range(document, len(texts)), range(document))
        return next(other for other in after if texts[other] != texts[document])
