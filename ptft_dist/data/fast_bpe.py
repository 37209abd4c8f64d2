"""Tokens of byte-level BPE tokenizers from gigatoken, which needs a small part of the time of `tokenizers`.

It is used only where its ids are known to be those of `tokenizers`. Each character is compared once, among others,
before it is used, because the two libraries know different versions of Unicode. The first texts, and then one of each
batch, are compared as a whole. What cannot be left to gigatoken goes to `tokenizers`: texts with a character that
differs, with an added token that is not special, or with a byte that the vocabulary lacks.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ptft_dist.errors import PtftError
from ptft_dist.reporting.messages import say

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VARIABLE = "PTFT_FAST_TOKENIZER"
"""Set this environment variable to 0 to use `tokenizers` alone."""

LEAST = 1_000_000
"""Characters that are encoded by `tokenizers` before gigatoken is loaded, which takes about a second."""
_COMPARED = 200_000  # characters of the first batch of gigatoken
_COMPARED_LATER = 2_000  # characters of a later batch
_REBUILT_AFTER = 1 << 25
"""Characters after which gigatoken is loaded again, because its cache of words has no limit."""
_PROBE = "a{0}b 1{0}2 {0}! '{0} {0}'s {0}{0}  {0}\n{0} ."
_NOTHING = re.compile(r"(?!)")
_PRE_TOKENIZERS = {"ByteLevel", "Digits", "Split"}


class Tokens(NamedTuple):
    """The tokens of a text."""

    ids: np.ndarray
    """uint32 [T]."""
    offsets: np.ndarray | None
    """[start, end) of each token in the text, in characters: int64 [T, 2]. None: not asked for."""


class TextTokens:
    """Encodes texts without the special tokens that a tokenizer puts around them, with gigatoken or `tokenizers`."""

    def __init__(self, backend: Tokenizer, *, offsets: bool) -> None:
        """backend: see `text_only_backend`. offsets: they are asked for."""
        self._backend, self._offsets = backend, offsets
        self._engine: FastBpe | None = None
        self._seen = 0  # characters, until gigatoken is loaded
        self._is_decided = False
        self._lock = threading.Lock()  # batches are encoded in several threads, see `workers.in_threads`

    def of(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text.

        Raises:
            PtftError: gigatoken gives other tokens than `tokenizers`, which was not noticed in the first batch.
        """
        with self._lock:
            if not self._is_decided:
                self._seen += sum(map(len, texts))
            if not self._is_decided and self._seen >= LEAST:
                self._engine, self._is_decided = _engine(self._backend, offsets=self._offsets), True
                if self._engine is not None and not self._engine.agrees(texts, _COMPARED):
                    say("gigatoken gives other tokens than tokenizers for these texts, so it is not used")
                    self._engine = None
            elif self._engine is not None and not self._engine.agrees(texts, _COMPARED_LATER):
                raise PtftError(
                    f"data: gigatoken gives other tokens than tokenizers for a text. Set {VARIABLE}=0 to do without "
                    "it, and start again."
                )
            if self._engine is not None:
                return self._engine.tokens(texts)
        return library_tokens(self._backend, texts, offsets=self._offsets)


def _engine(backend: Tokenizer, *, offsets: bool) -> FastBpe | None:
    """gigatoken for this tokenizer; None: it is not installed, not wanted or not suitable."""
    if os.environ.get(VARIABLE) == "0" or importlib.util.find_spec("gigatoken") is None:
        return None
    if not _suitable(json.loads(backend.to_str()), offsets=offsets):
        return None
    with contextlib.suppress(Exception):  # gigatoken has no class of errors for tokenizers that it does not support
        return FastBpe(backend, offsets=offsets)
    return None


class FastBpe:
    """gigatoken with the ids of `tokenizers`. Special tokens in a text are plain text for a backend whose
    `encode_special_tokens` is set."""

    def __init__(self, backend: Tokenizer, *, offsets: bool) -> None:
        """Load gigatoken. Raises Exception if it does not support the tokenizer."""
        self._backend, self._offsets = backend, offsets
        state = json.loads(backend.to_str())
        added, vocabulary = state["added_tokens"], state["model"]["vocab"]
        special = {} if backend.encode_special_tokens else {t["content"]: t["id"] for t in added if t["special"]}
        self._special = {content: np.array([number], np.uint32) for content, number in special.items()}
        self._at_special = _any_of(special)
        self._added = _any_of(token["content"] for token in added if not token["special"])
        self._top = max([*vocabulary.values(), *(token["id"] for token in added)]) + 1
        missing = [char for char in _byte_characters() if char not in vocabulary]
        vocabulary |= {char: self._top + i for i, char in enumerate(missing)}  # ids that `tokenizers` has to replace
        self._sizes = np.zeros(self._top + len(missing), np.int64)  # of the token with this id, in bytes
        self._sizes[list(vocabulary.values())] = [len(token) for token in vocabulary]  # a character stands for a byte
        self._sizes[list(special.values())] = [len(content.encode()) for content in special]
        self._json = json.dumps(state | {"added_tokens": [], "post_processor": None})
        self._is_known, self._is_equal = np.zeros(0x110000, bool), np.zeros(0x110000, bool)  # by code point
        self._load()

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of each text."""
        can = self._can(texts)
        encoded = iter(self._ids([text for text, own in zip(texts, can, strict=True) if own]))
        result = [self._tokens(text, next(encoded)) if own else None for text, own in zip(texts, can, strict=True)]
        rest = [i for i, tokens in enumerate(result) if tokens is None]
        others = iter(library_tokens(self._backend, [texts[i] for i in rest], offsets=self._offsets))
        return [next(others) if tokens is None else tokens for tokens in result]

    def agrees(self, texts: Sequence[str], characters: int) -> bool:
        """Whether the tokens of the first texts, up to so many characters, are those of `tokenizers`."""
        sample: list[str] = []
        for text in texts:
            if characters <= 0:
                break
            sample.append(text[:characters])
            characters -= len(text)
        right = library_tokens(self._backend, sample, offsets=self._offsets)
        return all(
            np.array_equal(one.ids, other.ids)
            and (one.offsets is None or other.offsets is None or np.array_equal(one.offsets, other.offsets))
            for one, other in zip(self.tokens(sample), right, strict=True)
        )

    def _tokens(self, text: str, ids: np.ndarray) -> Tokens | None:
        """The tokens of a text from its ids; None if `tokenizers` has to encode it."""
        if len(ids) and ids.max() >= self._top:
            return None
        if not self._offsets:
            return Tokens(ids, None)
        ends = self._sizes[ids].cumsum()
        starts = np.concatenate((ends[:0] if not len(ends) else [0], ends[:-1]))
        if not text.isascii():
            at = np.frombuffer(text.encode(), np.uint8)
            number = np.cumsum((at & 0xC0) != 0x80) - 1  # of the character that has this byte
            starts, ends = number[starts], number[ends - 1] + 1
        return Tokens(ids, np.stack((starts, ends), axis=1).astype(np.int64))

    def _ids(self, texts: list[str]) -> list[np.ndarray]:
        if self._at_special is None:
            return self._encode(texts)
        pieces = [self._at_special.split(text) for text in texts]  # text, special token, text and so on
        encoded = iter(self._encode([text for each in pieces for text in each[::2] if text]))
        none = [np.empty(0, np.uint32)]
        return [
            np.concatenate([self._special[p] if i % 2 else next(encoded) for i, p in enumerate(each) if p] or none)
            for each in pieces
        ]

    def _load(self) -> None:
        from gigatoken import Tokenizer

        self._engine: Any = None  # frees the memory of the one before
        self._engine = Tokenizer.from_json(self._json)
        self._left = _REBUILT_AFTER

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        self._left -= sum(map(len, texts))
        if self._left < 0:
            self._load()
        layout: Any = self._engine.encode_batch(texts).layout
        ids, ends = np.asarray(layout.content.data), np.asarray(layout.offsets.data).tolist()
        return [ids[start:stop] for start, stop in pairwise(ends)]

    def _can(self, texts: Sequence[str]) -> list[bool]:
        """Whether gigatoken may encode each text."""
        codes = _codes("".join(texts))
        if not (known := self._is_known[codes]).all():
            self._learn(np.unique(codes[~known]).tolist())
        if self._added is None and self._is_equal[codes].all():
            return [True] * len(texts)
        added = self._added or _NOTHING
        return [not added.search(text) and bool(self._is_equal[_codes(text)].all()) for text in texts]

    def _learn(self, codes: list[int]) -> None:
        """Compare characters."""
        probes = [_PROBE.format(chr(code)) for code in codes]
        right = library_tokens(self._backend, probes, offsets=False)
        for code, own, other in zip(codes, self._encode(probes), right, strict=True):
            self._is_known[code] = True
            # A character with a byte that the vocabulary lacks is as good: its texts are found by their ids.
            self._is_equal[code] = own.max() >= self._top or np.array_equal(own, other.ids)


def _codes(text: str) -> np.ndarray:
    """The code points of a text."""
    return np.frombuffer(text.encode(), np.uint8) if text.isascii() else np.frombuffer(text.encode("utf-32-le"), "<u4")


def library_tokens(backend: Tokenizer, texts: Sequence[str], *, offsets: bool) -> list[Tokens]:
    """The tokens of each text from `tokenizers`."""
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    encoded = encode(list(texts), add_special_tokens=False) if texts else []
    return [
        Tokens(np.array(each.ids, np.uint32), np.array(each.offsets, np.int64).reshape(-1, 2) if offsets else None)
        for each in encoded
    ]


def _suitable(state: Mapping[str, Any], *, offsets: bool) -> bool:
    """Whether a tokenizer has only parts that were compared. state: the contents of tokenizer.json."""
    model, before = state["model"], _steps(state["pre_tokenizer"], "pretokenizers")
    names = [step["type"] for step in before]
    trims = any(step.get("trim_offsets") for step in _steps(state["post_processor"], "processors"))
    unknown = ("dropout", "unk_token", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    around = ("single_word", "lstrip", "rstrip")  # an added token takes white space with it
    return (
        model["type"] == "BPE"
        and not any(model.get(key) for key in unknown)
        and state["normalizer"] is None
        and names[-1:] == ["ByteLevel"]
        and before[-1]["use_regex"] == ("Split" not in names)
        and _PRE_TOKENIZERS.issuperset(names)
        and not any(step.get("add_prefix_space") for step in before)
        and not any(token[key] for token in state["added_tokens"] for key in around)
        and not (offsets and trims)
    )


def _steps(part: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    return part[key] if part["type"] == "Sequence" else [part]


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """A pattern with one group that finds these texts, the longest first; None if there are none."""
    choices = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    return re.compile(f"({choices})") if choices else None


def _byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in the vocabulary of a byte-level tokenizer."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())
