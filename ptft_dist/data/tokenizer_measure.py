"""Measures tokenizers on texts, per source and language: bytes per token, fertility, unknown tokens, whole words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ptft_dist.data.chunks import CHUNK_CHARACTERS
from ptft_dist.data.cleaning.words import is_segmented, words
from ptft_dist.data.tokenizer import text_only_backend

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_LANGUAGES = 10
_LEAST_SHARE = 0.01
OTHER = "other"
"""Stands for all languages but the most frequent ones, and for those with less than 1 % of the bytes: short texts are
often taken for another language."""


@dataclass(frozen=True)
class Compression:
    """What a tokenizer makes of some texts, special tokens not included. Words are those of `cleaning.words`."""

    bytes: int
    """In UTF-8."""
    tokens: int
    unknown_tokens: int
    words: int = 0
    """Without punctuation. In scripts without spaces, each character is a word."""
    characters: int = 0
    """Words of texts in scripts without spaces, most of which are characters."""
    word_tokens: int = 0
    """Tokens that contain a part of a word."""
    whole_words: int = 0
    """Words that lie within one token, which is not the unknown token."""

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)

    @property
    def fertility(self) -> float:
        """Tokens per word (Rust et al. 2021); below 1 if tokens contain several characters that are words."""
        return self.word_tokens / max(1, self.words)

    @property
    def unit(self) -> str:
        """What most words are: "word", or "character" in scripts without spaces."""
        return "character" if 2 * self.characters > self.words else "word"

    @property
    def whole_share(self) -> float:
        return self.whole_words / max(1, self.words)

    @property
    def unknown_rate(self) -> float:
        return self.unknown_tokens / max(1, self.tokens)

    def __add__(self, other: Compression) -> Compression:
        return Compression(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def to_dict(self) -> dict[str, Any]:
        """The counts, and what follows from them."""
        rates = {
            "bytes_per_token": round(self.bytes_per_token, 4),
            "fertility": round(self.fertility, 4),
            "fertility_unit": f"tokens per {self.unit}",
            "whole_words_share": round(self.whole_share, 4),
            "unknown_rate": round(self.unknown_rate, 6),
        }
        return asdict(self) | rates

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})


def astuple(compression: Compression) -> tuple[int, ...]:
    return tuple(getattr(compression, name) for name in Compression.__dataclass_fields__)


@dataclass
class SideCompression:
    """One tokenizer on the texts of one side."""

    total: Compression
    sources: dict[str, Compression] = field(default_factory=dict)
    languages: dict[str, Compression] = field(default_factory=dict)
    """By ISO 639 code, the most bytes first; the rest together is `OTHER`."""

    def to_dict(self) -> dict[str, Any]:
        groups = {"sources": self.sources, "languages": self.languages}
        return self.total.to_dict() | {
            name: {key: each.to_dict() for key, each in group.items()} for name, group in groups.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        groups = ({k: Compression.from_dict(v) for k, v in values[name].items()} for name in ("sources", "languages"))
        return cls(Compression.from_dict(values), *groups)


def measure(
    tokenizers: Mapping[str, PreTrainedTokenizerBase], texts: Iterable[tuple[str, str]]
) -> dict[str, SideCompression] | None:
    """Measure tokenizers on texts with the name of their source; None without texts."""
    from ptft_dist.data.cleaning.language import language_of

    backends = {name: text_only_backend(tokenizer) for name, tokenizer in tokenizers.items()}
    found: dict[str, dict[tuple[str, str], Compression]] = {name: {} for name in tokenizers}
    for batch in _batches(texts):
        groups = [(source, language_of(text)[0]) for source, text in batch]
        plain = [text for _, text in batch]
        spans = [word_spans(text) for text in plain]
        unsegmented = [not is_segmented(text) for text in plain]
        for name, backend in backends.items():
            counts = found[name]
            encoded = backend.encode_batch(plain, add_special_tokens=False)
            for group, text, each, own, characters in zip(groups, plain, encoded, spans, unsegmented, strict=True):
                one = compression_of(text, each.ids, each.offsets, own, characters, tokenizers[name].unk_token_id)
                counts[group] = counts[group] + one if group in counts else one
    return {name: _grouped(counts) for name, counts in found.items()} if any(found.values()) else None


def word_spans(text: str) -> np.ndarray:
    """Start and end of each word, [W, 2], in characters."""
    spans, end = [], 0
    for word in words(text):
        start = text.index(word, end)
        end = start + len(word)
        spans.append((start, end))
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def compression_of(
    text: str,
    ids: Sequence[int],
    offsets: Sequence[tuple[int, int]],
    spans: np.ndarray,
    characters: bool,
    unknown_id: int | None,
) -> Compression:
    """Count the tokens of one text.

    Args:
        offsets: start and end of each token, in characters.
        spans: those of each word, [W, 2].
        characters: most words are characters.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    first = np.searchsorted(np.maximum.accumulate(ends), spans[:, 0], "right")  # of the tokens that touch the word
    after = np.searchsorted(starts, spans[:, 1], "left")
    touched = np.maximum(after - first, 0)
    reached = np.concatenate([[0], np.maximum.accumulate(after)[:-1]]) if len(after) else after
    unknown = np.array(ids, dtype=np.int64) == (-1 if unknown_id is None else unknown_id)
    single = first[touched == 1]
    return Compression(
        bytes=len(text.encode()),
        tokens=len(ids),
        unknown_tokens=int(unknown.sum()),
        words=len(spans),
        characters=len(spans) if characters else 0,
        word_tokens=int(np.maximum(after - np.maximum(first, reached), 0).sum()),
        whole_words=int((~unknown[single]).sum()),
    )


def _grouped(counts: Mapping[tuple[str, str], Compression]) -> SideCompression:
    def by(part: int) -> dict[str, Compression]:
        sums: dict[str, Compression] = {}
        for group, each in counts.items():
            sums[group[part]] = sums[group[part]] + each if group[part] in sums else each
        return sums

    languages = dict(sorted(by(1).items(), key=lambda each: (-each[1].bytes, each[0])))
    total = reduce(add, counts.values())
    least = _LEAST_SHARE * total.bytes
    rare = [code for i, (code, each) in enumerate(languages.items()) if i >= _MOST_LANGUAGES or each.bytes < least]
    if rare:
        languages[OTHER] = reduce(add, [languages.pop(code) for code in rare])
    return SideCompression(total, by(0), languages)


def _batches(texts: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Texts in groups of about CHUNK_CHARACTERS characters."""
    batch: list[tuple[str, str]] = []
    size = 0
    for source, text in texts:
        batch.append((source, text))
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
