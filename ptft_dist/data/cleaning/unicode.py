"""Repair of wrongly decoded text, and Unicode normalization."""

from __future__ import annotations

import re
import unicodedata
from typing import ClassVar

from ftfy import TextFixerConfig, fix_encoding_and_explain
from ftfy.fixes import fix_surrogates, unescape_html

from ptft_dist.config.cleaning import UnicodeStep
from ptft_dist.data.cleaning.text_step import Cleaned

_SUSPECT = re.compile(
    "[^\x00-\x7f\u2013\u2014\u2018-\u201f\u2026\u2e80-\ua4cf\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\ufe30-\ufe4f"
    "\uff00-\uffef\U0001f300-\U0010ffff]"
)
"""Mojibake has one of these characters: quotes, dashes, CJK and emoji alone are never the result of a wrong decoding,
since no byte that begins a UTF-8 sequence is decoded as one of them."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_MOST_PASSES = 10


class Unicode:
    """Repairs mojibake, HTML entities in text without tags, and surrogates with ftfy (Speer 2019); then normalizes.

    Repeated until nothing changes, so that text that was damaged twice is repaired, and a second run changes nothing.
    """

    libraries: ClassVar[tuple[str, ...]] = ("ftfy",)
    edits: ClassVar[bool] = True

    def __init__(self, settings: UnicodeStep) -> None:
        self._form = settings.form
        self._config = TextFixerConfig(explain=False)

    def __call__(self, text: str) -> Cleaned:
        for _ in range(_MOST_PASSES):
            before = text
            text = unicodedata.normalize(self._form, self._repaired(text))
            if text == before:
                break
        return Cleaned(text)

    def _repaired(self, text: str) -> str:
        if "&" in text and "<" not in text:
            text = unescape_html(text)
        if not text.isascii():
            if _SURROGATE.search(text):
                text = fix_surrogates(text)
            if _SUSPECT.search(text):  # line by line: ftfy judges the whole string at once
                text = "\n".join([self._decoded(line) for line in text.split("\n")])
        return text

    def _decoded(self, line: str) -> str:
        return fix_encoding_and_explain(line, self._config).text if _SUSPECT.search(line) else line
