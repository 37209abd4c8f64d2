"""Remove characters that cannot be seen, and terminal escapes."""

from __future__ import annotations

import re
from typing import ClassVar

from ptft_dist.data.cleaning.text_step import Cleaned

_ESCAPE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]"  # colours and cursor (CSI), such as ESC[31m
    r"|\][^\x07\x1b\n]*(?:\x07|\x1b\\)"  # titles and links (OSC), ended by BEL or ESC \
    r"|[ -/]*[0-Z\\^-~])"  # others
)
_BREAK = re.compile("[\x0b\x0c\x1c-\x1e\x85]")  # vertical tab, form feed, separators and next line end a line

_JOINED = "\u0600-\u08ff\u0900-\u0df3\u1000-\u109f\u1780-\u18af\ufb50-\ufdcf\ufdf0-\ufdff\ufe70-\ufefc"
"""Arabic, Indic, Myanmar, Khmer and Mongolian scripts, where (non-)joiners change words."""
_EMOJI = "\u00a9\u00ae\u203c-\u2049\u2122-\u21aa\u2300-\u2bff\u3030\u303d\u3297\u3299\U0001f000-\U0001faff"

_INVISIBLE = re.compile(
    "(\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{1,6}\U000e007f)"  # flags of regions: kept
    "|[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f]"  # C0 and C1
    "|[\xad\u200b\u2060-\u2064\ufeff\u180e]"  # soft hyphen, zero-width spaces, invisible operators, byte order mark
    "|[\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f]"  # directions
    "|[\ufff9-\ufffb\U000e0000-\U000e007f]"  # annotations and tags
    "|[\ufdd0-\ufdef\ufffe\uffff]"  # not characters
    "|[\ue000-\uf8ff\U000f0000-\U0010ffff]"  # private use
    f"|(?<![{_JOINED}])\u200c"  # zero-width non-joiner
    f"|(?<![{_JOINED}])(?<![{_EMOJI}\ufe0f\u20e3](?=\u200d[{_EMOJI}]))\u200d"  # zero-width joiner
)

_SUSPECT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ue000-\uf8ff"
    "\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff\U0001f3f4\U000e0000-\U0010ffff]"
)
"""One of these is in every match of the patterns above; most texts have none."""


class Control:
    """Removes control and invisible characters and ANSI escapes (ECMA-48), except tabs and line ends.

    Joiners are kept inside emoji and after letters of scripts that need them. Private-use characters are removed: their
    meaning depends on one font, most often one of icons.
    """

    libraries: ClassVar[tuple[str, ...]] = ()
    edits: ClassVar[bool] = True

    def __call__(self, text: str) -> Cleaned:
        if not _SUSPECT.search(text):
            return Cleaned(text)
        if "\x1b" in text:
            text = _ESCAPE.sub("", text)
        return Cleaned(_INVISIBLE.sub(r"\1", _BREAK.sub("\n", text)))
