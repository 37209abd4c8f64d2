"""Lines and paragraphs of a text, and how much of them is repeated."""

from __future__ import annotations

import re
from collections.abc import Sequence

_BETWEEN_PARAGRAPHS = re.compile(r"\n[^\S\n]*\n\s*")


def lines(text: str) -> list[str]:
    """The lines that are not empty, without the spaces around them."""
    return [line for each in text.split("\n") if (line := each.strip())]


def paragraphs(text: str) -> list[str]:
    """The paragraphs, which empty lines separate, without the spaces around them."""
    return [paragraph for each in _BETWEEN_PARAGRAPHS.split(text) if (paragraph := each.strip())]


def repeated(parts: Sequence[str]) -> tuple[float, float]:
    """The fraction of parts that repeat an earlier one, and the fraction of characters in them; 0 without parts."""
    once = set(parts)
    if len(once) == len(parts):
        return 0.0, 0.0
    characters = sum(map(len, parts))
    return (len(parts) - len(once)) / len(parts), (characters - sum(map(len, once))) / characters
