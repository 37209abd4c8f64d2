"""Spaces and empty lines."""

from __future__ import annotations

import re
from typing import ClassVar

from ptft_dist.config.cleaning import WhitespaceStep
from ptft_dist.data.cleaning.text_step import Cleaned

_LINE_END = re.compile("\r\n?|[\u0085\u2028\u2029]")
_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f]")
"""Spaces of other widths, without the ideographic space, which is the usual one in Chinese and Japanese."""
_RUN = re.compile("[ \t\u3000]{2,}")


class Whitespace:
    """Spaces and line ends in one form: LF, plain spaces, one between words, none at the ends of lines and of the text.

    The indentation of a line is kept, since code and lists need it. A run with a tab becomes a tab.
    """

    libraries: ClassVar[tuple[str, ...]] = ()
    edits: ClassVar[bool] = True

    def __init__(self, settings: WhitespaceStep) -> None:
        self._most = "\n" * (settings.empty_lines + 1)
        self._empty = re.compile(f"\n{{{settings.empty_lines + 2},}}")

    def __call__(self, text: str) -> Cleaned:
        text = _LINE_END.sub("\n", text)
        if not text.isascii():
            text = _SPACE.sub(" ", text)
        if "  " in text or "\t" in text or "\u3000" in text:
            text = _RUN.sub(_shorter, text)
        text = "\n".join([line.rstrip() for line in text.split("\n")])
        return Cleaned(self._empty.sub(self._most, text).strip())


def _shorter(match: re.Match[str]) -> str:
    run, start = match[0], match.start()
    if start == 0 or match.string[start - 1] == "\n":
        return run  # indentation
    return "\t" if "\t" in run else " " if " " in run else "\u3000"
