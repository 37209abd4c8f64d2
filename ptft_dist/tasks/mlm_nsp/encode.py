"""Encodes documents as pairs of segments for next-sentence prediction (Devlin et al. 2019).

Two passes: the first writes the token ids of all sentences to temporary files beside the store; the second reads them
through memory maps and writes the pairs. So memory does not grow with the corpus.
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

FOLLOWS, UNRELATED = 0, 1  # BERT's next_sentence_label
_SPECIAL = 3  # [CLS] A [SEP] B [SEP]
_TRIES = 100
# A sentence ends after . ! ? before white space, after a Chinese full stop, question or exclamation mark, each with
# closing quotes and brackets, or at a line end.
_END = re.compile(
    "[.!?]+[\"')\\]\u00bb\u2019\u201d]*(?=\\s)|[\u3002\uff01\uff1f]+[\"')\\]\u2019\u201d\u300d\u300f\uff09]*|\n"
)


def split_sentences(text: str, kind: str) -> list[str]:
    """The sentences of a text, stripped of white space. kind: `line` or `punctuation`, see mlm_nsp.sentence."""
    if kind == "line":
        pieces = text.splitlines()
    else:
        cuts = [0, *(match.end() for match in _END.finditer(text)), len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
    return [piece.strip() for piece in pieces if piece.strip()]


class PairRows(Documents):
    """Encodes each document as the token ids of its sentences. The writer builds the pairs from all documents."""

    store = ExampleStore
    settings: MlmNspSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        if self.max_length < _SPECIAL + 2:
            raise RecipeError(
                f"data.max_length: {self.max_length} is too short for a pair; raise it to {_SPECIAL + 2} or more."
            )
        self.seed = context.seed
        self.encoder = DocumentEncoder(self.tokenizer, ("cls", "sep"))

    def encode(self, documents: Sequence[Document]) -> list[Outcome]:
        """The outcome of each document. Sentences without a token are dropped."""
        sentences = [[Document(s, d.where) for s in split_sentences(d.text, self.settings.sentence)] for d in documents]
        ids = iter(self.encoder.encode([sentence for each in sentences for sentence in each]))
        return [
            self._outcome(document, [one[1:-1].tolist() for one in (next(ids) for _ in each) if len(one)])
            for document, each in zip(documents, sentences, strict=True)
        ]

    def _outcome(self, document: Document, sentences: list[list[int]]) -> Outcome:
        if not sentences:
            return Outcome(dropped=EMPTY)
        unknown_id = self.encoder.unknown_id
        unknown = 0 if unknown_id is None else sum(ids.count(unknown_id) for ids in sentences)
        return Outcome([Example({"sentences": sentences, "text": text_hash(document.text)})], unknown_tokens=unknown)

    def length(self, example: Example) -> int:
        return sum(map(len, example.columns["sentences"]))

    def writer(self, path: Path, side: Side) -> PairWriter:
        return PairWriter(self, path, side)


def text_hash(text: str) -> int:
    """Hash of a text without the white space at both ends; fits into int64."""
    return int.from_bytes(hashlib.blake2b(text.strip().encode(), digest_size=8).digest(), "big", signed=True)


class PairWriter:
    """Collects the sentences of one side in files, then writes the pairs of all documents.

    Columns of the store: input_ids ([CLS] A [SEP] B [SEP]), token_type_ids (1 for B [SEP]), next (0: B follows A, 1: B
    is from another document). Pairs are a pure function of (seed, side, duplicate, document).
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
        """Write the pairs and return the summary of the store.

        Raises:
            DataError: there are fewer than two different documents, or no document has two sentences.
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
        self._counts.add("with a random second segment" if pair.unrelated else "with the next segment", where)
        tokenizer = self._encoder.tokenizer
        cls, sep = [tokenizer.cls_token_id], [tokenizer.sep_token_id]
        return {
            "input_ids": np.concatenate((cls, first, sep, second, sep)),
            "token_type_ids": np.repeat([0, 1], [len(first) + 2, len(second) + 1]),
            "next": UNRELATED if pair.unrelated else FOLLOWS,
        }


def _check_documents(side: Side, sentences: Sentences) -> None:
    """Raises DataError if negative pairs or positive pairs are impossible."""
    remedy = "Give more documents" + ", or a larger data.validation" * (side == "validation")
    if len(sentences) and bool((sentences.texts == sentences.texts[0]).all()):
        raise DataError(
            f"data: {side} has only one document, or several with the same text; half of the pairs take their second "
            f"segment from another document. {remedy}, or split them (document: paragraph)."
        )
    if len(sentences) and bool((np.diff(sentences.firsts) == 1).all()):
        raise DataError(
            f"data: {side} has no document with two sentences, so no segment follows another. {remedy}, longer "
            "documents, correct mlm_nsp.sentence, or use task: mlm."
        )


class SentenceWriter:
    """Writes the sentences of one side to files.

    A token store whose documents are the sentences, and beside it:
        firsts.npy: int64 [D + 1], each document's first sentence, and at the end the number of sentences.
        texts.npy: int64 [D], the hash of each document's text.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._path, self._count = path, 0
        self._store = StoreWriter(path, vocab_size=vocab_size, max_length=2**40, packing=True)
        self._firsts, self._texts = Int64Stream(path / "firsts.npy"), Int64Stream(path / "texts.npy")

    def add(self, text: int, sentences: list[list[int]]) -> None:
        """Append a document. text: its `text_hash`; sentences: token ids of each sentence."""
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
        """The tokens of the sentences [first, end)."""
        return self.tokens[self.starts[first] : self.starts[end]]

    def reach(self, first: int, last: int, length: int) -> int:
        """The smallest `end` for which the sentences [first, end) have at least `length` tokens; at most `last`."""
        sentences = np.searchsorted(self.starts[first : last + 1], self.starts[first] + length)
        return min(first + int(sentences), last)

    def near(self, first: int, last: int, length: int) -> int:
        """The `end` for which the number of tokens of the sentences [first, end) is closest to `length`."""
        end = self.reach(first, last, length)
        less, more = (int(self.starts[i] - self.starts[first]) for i in (end - 1, end))
        return end - 1 if less and length - less < more - length else end


@dataclass(frozen=True)
class Pair:
    """Two segments of token ids."""

    first: np.ndarray
    second: np.ndarray
    unrelated: bool
    """The second segment does not follow the first (a negative pair)."""

    def fitted(self, room: int) -> tuple[np.ndarray, np.ndarray]:
        """Truncate both to at most `room` tokens together: the longer one first, then both equally.

        The first segment loses its beginning and the second its end, so that the boundary between them is kept.
        """
        second = self.second[: max(room - len(self.first), room // 2)]
        return self.first[-(room - len(second)) :], second


class Cutter:
    """Splits documents into pairs, half of them negative pairs (with an unrelated second segment)."""

    def __init__(self, sentences: Sentences, room: int, short_probability: float) -> None:
        self.sentences, self.room, self.short_probability = sentences, room, short_probability
        self.owed = 0  # forced negatives so far; the same number of later pairs is forced positive

    def pairs(self, document: int, random: np.random.Generator) -> Iterator[Pair]:
        """The pairs of one document.

        Sentences are collected up to `room` tokens or a random shorter length, and split into two segments at a random
        sentence. In a negative pair, the replaced sentences are used again for the next pair. The last sentence of a
        document has no successor, so its pair is a forced negative.
        """
        at, last = (int(x) for x in self.sentences.firsts[document : document + 2])
        while at < last:
            short = random.random() < self.short_probability
            target = int(random.integers(2, self.room + 1)) if short else self.room
            end = max(self.sentences.reach(at, last, target), min(at + 2, last))
            middle = at + int(random.integers(1, max(end - at, 2)))
            first, follows = self.sentences.ids(at, middle), self.sentences.ids(middle, end)
            unrelated = self._draw_unrelated(len(follows) > 0, random)
            if unrelated:
                length = len(follows) or max(target - len(first), 1)
                yield Pair(first, self._elsewhere(document, length, follows, random), True)
            else:
                yield Pair(first, follows, False)
            at = middle if unrelated else end

    def _draw_unrelated(self, has_next: bool, random: np.random.Generator) -> bool:
        """Whether the next pair is negative. Forced negatives and forced positives are balanced."""
        if has_next and not self.owed:
            return bool(random.random() < 0.5)
        self.owed += -1 if has_next else 1
        return not has_next

    def _elsewhere(self, document: int, length: int, replaced: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A segment of another document, with about `length` tokens if the document has as many.

        Its position and length have the same distribution as those of following segments, so they do not reveal that
        it is unrelated. It differs from the segment that it replaces.
        """
        sentences = self.sentences
        for _ in range(_TRIES):
            other = self._other(document, random)
            first, last = (int(x) for x in sentences.firsts[other : other + 2])
            starts = sentences.starts[first : last + 1]
            choices = int(np.searchsorted(starts, starts[-1] - length, side="right"))
            start = first + int(random.integers(max(choices, 1)))
            segment = sentences.ids(start, sentences.near(start, last, length))
            common = min(len(segment), len(replaced))
            if not common or not np.array_equal(segment[:common], replaced[:common]):
                break
        return segment

    def _other(self, document: int, random: np.random.Generator) -> int:
        """A random document with a different text."""
        texts = self.sentences.texts
        for _ in range(_TRIES):
            other = int(random.integers(len(texts)))
            if texts[other] != texts[document]:
                return other
        # Nearly all documents have the same text: take the next different one. `_check_documents` ensures it exists.
        candidates = itertools.chain(range(document, len(texts)), range(document))
        return next(other for other in candidates if texts[other] != texts[document])
