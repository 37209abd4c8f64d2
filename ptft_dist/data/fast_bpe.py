"""Token ids of byte-level BPE tokenizers from gigatoken, which needs a small part of the time of `tokenizers`.

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
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ptft_dist.errors import PtftError
from ptft_dist.reporting.messages import say

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VARIABLE = "PTFT_FAST_TOKENIZER"
"""Set this environment variable to 0 to use `tokenizers` alone."""

_LEAST = 200_000
"""Characters of the first batch; fewer are encoded sooner than this engine is built."""
_COMPARED = 200_000  # characters of the first batch
_COMPARED_LATER = 5_000  # characters of a text of each later batch
_REBUILT_AFTER = 1 << 26
"""Characters after which the engine is built again, because its cache of words has no limit."""
_PROBES = "a{0}b 1{0}2 {0}! '{0} {0}'s {0}{0}  {0}\n{0} ."
_PRE_TOKENIZERS = {"ByteLevel", "Digits", "Split"}


class FastBpe:
    """Encodes texts as plain text: a special token in a text is not special."""

    def __init__(self, backend: Tokenizer) -> None:
        """backend: see `text_only_backend`. Raises Exception if gigatoken cannot do what it does."""
        self._backend = backend
        state = json.loads(backend.to_str())
        plain = [token["content"] for token in state["added_tokens"] if not token["special"]]
        vocabulary = state["model"]["vocab"]
        self._top = max([*vocabulary.values(), *(token["id"] for token in state["added_tokens"])]) + 1
        missing = [char for char in _byte_characters() if char not in vocabulary]
        vocabulary |= {char: self._top + i for i, char in enumerate(missing)}  # ids that `tokenizers` has to replace
        self._json = json.dumps(state | {"added_tokens": [], "post_processor": None})
        self._added = re.compile("|".join(map(re.escape, plain))) if plain else None
        self._is_known, self._is_equal = np.zeros(0x110000, bool), np.zeros(0x110000, bool)  # by code point
        self._left, self._begun = 0, False

    @classmethod
    def of(cls, backend: Tokenizer, texts: Sequence[str]) -> Self | None:
        """The engine for a tokenizer; None: use `tokenizers`.

        texts: the first batch.
        """
        if os.environ.get(VARIABLE) == "0" or importlib.util.find_spec("gigatoken") is None:
            return None
        if sum(map(len, texts)) < _LEAST or not _suitable(json.loads(backend.to_str())):
            return None
        with contextlib.suppress(Exception):  # gigatoken has no class of errors for tokenizers that it does not support
            engine = cls(backend)
            engine._build()
            return engine
        return None

    def ids(self, texts: Sequence[str]) -> list[np.ndarray] | None:
        """The token ids of each text, [T]; None if they differ in the first batch, and the engine cannot be used.

        Raises:
            PtftError: the ids of a later text differ.
        """
        own = [self._can(text) for text in texts]
        encoded = iter(self._encode([text for text, can in zip(texts, own, strict=True) if can]))
        result = [next(encoded) if can else None for can in own]
        missing = [i for i, ids in enumerate(result) if ids is None or (len(ids) and ids.max() >= self._top)]
        for i, ids in zip(missing, library_ids(self._backend, [texts[i] for i in missing]), strict=True):
            result[i] = ids
        complete = [ids for ids in result if ids is not None]
        if self._same(texts, complete):
            return complete
        if not self._begun:
            say("gigatoken gives other token ids than tokenizers for these texts, so it is not used")
            return None
        raise PtftError(
            f"data: gigatoken gives other token ids than tokenizers for a text. Set {VARIABLE}=0 to do without it, "
            "and start again."
        )

    def _build(self) -> None:
        from gigatoken import Tokenizer

        self._engine = Tokenizer.from_json(self._json)
        self._left = _REBUILT_AFTER

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        if not texts:
            return []
        self._left -= sum(map(len, texts))
        if self._left < 0:
            self._build()
        layout: Any = self._engine.encode_batch(texts).layout
        ids, ends = np.asarray(layout.content.data), np.asarray(layout.offsets.data).tolist()
        return [ids[start:stop] for start, stop in zip(ends, ends[1:], strict=False)]

    def _can(self, text: str) -> bool:
        """Whether gigatoken may encode a text."""
        if self._added is not None and self._added.search(text):
            return False
        if text.isascii():
            codes = np.frombuffer(text.encode(), np.uint8)
        else:
            codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
        if not self._is_known[codes].all():
            self._learn(np.unique(codes[~self._is_known[codes]]).tolist())
        return bool(self._is_equal[codes].all())

    def _learn(self, codes: list[int]) -> None:
        """Compare characters."""
        probes = [_PROBES.format(chr(code)) for code in codes]
        for code, own, right in zip(codes, self._encode(probes), library_ids(self._backend, probes), strict=True):
            self._is_known[code] = True
            # A character with a byte that the vocabulary lacks is as good: its texts are found by their ids.
            self._is_equal[code] = own.max() >= self._top or np.array_equal(own, right)

    def _same(self, texts: Sequence[str], encoded: Sequence[np.ndarray]) -> bool:
        """Compare the beginning of the first batch, and one text of a later one."""
        left = _COMPARED_LATER if self._begun else _COMPARED
        count = 0
        for text in texts:
            left -= len(text)
            if left < 0:
                break
            count += 1
        right = library_ids(self._backend, list(texts[:count]))
        same = all(map(np.array_equal, encoded, right))
        self._begun |= same
        return same


def library_ids(backend: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """The token ids of each text from `tokenizers`: uint32 [T]."""
    return [np.array(each.ids, np.uint32) for each in backend.encode_batch_fast(texts, add_special_tokens=False)]


def _suitable(state: dict[str, Any]) -> bool:
    """Whether a tokenizer has only parts that were compared. state: of its tokenizer.json."""
    model, steps = state["model"], state["pre_tokenizer"] or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    names = [step.get("type") for step in steps]
    return (
        model["type"] == "BPE"
        and not any(model.get(key) for key in ("dropout", "unk_token", "byte_fallback", "continuing_subword_prefix"))
        and not model.get("end_of_word_suffix")
        and state["normalizer"] is None
        and names[-1:] == ["ByteLevel"]
        and _PRE_TOKENIZERS.issuperset(names)
    )


def _byte_characters() -> list[str]:
    """The 256 characters that stand for bytes in the vocabulary of a byte-level tokenizer."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())
