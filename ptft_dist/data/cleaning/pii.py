"""Masking of personal data."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import phonenumbers

from ptft_dist.config.cleaning import PiiStep
from ptft_dist.data.cleaning.text_step import Cleaned

_EMAIL = re.compile(
    r"(?<![\w.%+-])[A-Za-z0-9\u00c0-\u024f_][\w.%+-]{0,63}@(?:[A-Za-z0-9\u00c0-\u024f](?:[\w-]{0,61}[\w])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![A-Za-z0-9_-])".replace(r"\w", "A-Za-z0-9_\u00c0-\u024f"),
)
_FILE_ENDINGS = frozenset(("png", "jpg", "jpeg", "gif", "svg", "webp", "bmp", "ico", "css", "js", "pdf"))  # icon@2x.png

_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)", re.ASCII)
_VERSION = re.compile(
    r"(?:\b(?:v|ver|version|release|section|sec|chapter|clause|rev)\.?|版本号?|章节?|第)[ :：]{0,2}$", re.IGNORECASE
)
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}(?![\w:]|\.\d)", re.ASCII)

_CHINESE_ID = re.compile(
    r"(?<![0-9A-Za-z])[1-8]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?![0-9A-Za-z])",
    re.ASCII,
)
_PROVINCES = re.compile("1[1-5]|2[1-3]|3[1-7]|4[1-6]|5[0-4]|6[1-5]|71|8[1-3]")
_ID_WEIGHTS = [2**i % 11 for i in range(17, 0, -1)]

_CHINESE_MOBILE = re.compile(
    r"(?<![0-9A-Za-z.+$￥¥€£-])(?:(?:\+|00)?86[- ]?)?1[3-9]\d(?P<gap>[- ]?)\d{4}(?P=gap)\d{4}"
    r"(?![0-9A-Za-z]|[.-]\d|\s?[元万亿])",
    re.ASCII,
)

_INTERNATIONAL = re.compile(
    r"(?<![0-9A-Za-z+])\+[1-9]\d{0,2}(?:[ .-]?\(?\d{1,5}\)?){2,6}(?![0-9A-Za-z]|[.,]\d)", re.ASCII
)
_NORTH_AMERICAN = re.compile(
    r"(?<![0-9A-Za-z.+(-])(?:1[-. ])?(?:\(\d{3}\)[ -]?|\d{3}[-. ])\d{3}[-. ]\d{4}(?![0-9A-Za-z]|[.-]\d)", re.ASCII
)
_CHINESE_LANDLINE = re.compile(
    r"(?<![0-9A-Za-z.+(（-])(?:[(（]0\d{2,3}[)）][- ]?|0\d{2,3}[- ])\d{7,8}(?![0-9A-Za-z]|[.-]\d)", re.ASCII
)


class Pii:
    """Replaces personal data by the kind of it, such as <EMAIL>.

    Phone numbers must be valid by the tables of libphonenumber, resident IDs by date and checksum (GB 11643-1999).
    Addresses of private networks name nobody and are kept.
    """

    libraries: ClassVar[tuple[str, ...]] = ("phonenumbers",)
    edits: ClassVar[bool] = True

    def __init__(self, settings: PiiStep) -> None:
        self._kinds = [(kind.upper(), MASKS[kind]) for kind in MASKS if kind in settings.kinds]
        self._hints = {mask.hint for _, masks in self._kinds for mask in masks}

    def __call__(self, text: str) -> Cleaned:
        notes = []
        hints = {hint for hint in self._hints if hint.search(text)}
        for name, masks in self._kinds:
            before = text
            for mask in masks:
                if mask.hint in hints:
                    text = mask.replaced(text, f"<{name}>")
            if text != before:
                notes.append(f"masked {name}")
        return Cleaned(text, notes=tuple(notes))


def _is_email(match: re.Match[str]) -> bool:
    return match[0].rpartition(".")[2].lower() not in _FILE_ENDINGS


def _is_public_ipv4(match: re.Match[str]) -> bool:
    """A version or section number looks the same; what stands before tells."""
    try:
        return ipaddress.IPv4Address(match[0]).is_global and not _VERSION.search(
            match.string, max(0, match.start() - 20), match.start()
        )
    except ValueError:
        return False


def _is_public_ipv6(match: re.Match[str]) -> bool:
    try:
        return ipaddress.IPv6Address(match[0]).is_global
    except ValueError:
        return False


def _is_chinese_id(match: re.Match[str]) -> bool:
    """Region, date of birth and check digit (ISO 7064 MOD 11-2) are right."""
    number = match[0]
    try:
        datetime.date(int(number[6:10]), int(number[10:12]), int(number[12:14]))
    except ValueError:
        return False
    total = sum(weight * int(digit) for weight, digit in zip(_ID_WEIGHTS, number, strict=False))
    return _PROVINCES.match(number) is not None and "10X98765432"[total % 11] == number[17].upper()


def _is_phone(region: str | None) -> Callable[[re.Match[str]], bool]:
    def valid(match: re.Match[str]) -> bool:
        try:
            return phonenumbers.is_valid_number(phonenumbers.parse(match[0], region))
        except phonenumbers.NumberParseException:
            return False

    return valid


class Mask(NamedTuple):
    """How personal data of one form are found."""

    hint: re.Pattern[str]
    """Found quickly, and part of every match of the pattern."""
    pattern: re.Pattern[str]
    is_valid: Callable[[re.Match[str]], bool]

    def replaced(self, text: str, by: str) -> str:
        """The text with each valid match replaced."""
        return self.pattern.sub(lambda match: by if self.is_valid(match) else match[0], text)


_SEVEN_DIGITS = re.compile(r"\d(?:[-. ()（）]{0,3}\d){6}", re.ASCII)
MASKS = {
    "email": [Mask(re.compile("@"), _EMAIL, _is_email)],
    "chinese_id": [Mask(_SEVEN_DIGITS, _CHINESE_ID, _is_chinese_id)],
    "chinese_mobile": [Mask(_SEVEN_DIGITS, _CHINESE_MOBILE, lambda _match: True)],
    "ip": [
        Mask(re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d", re.ASCII), _IPV4, _is_public_ipv4),
        Mask(re.compile(r"[23][0-9A-Fa-f]{3}:"), _IPV6, _is_public_ipv6),
    ],
    "phone": [
        Mask(_SEVEN_DIGITS, _INTERNATIONAL, _is_phone(None)),
        Mask(_SEVEN_DIGITS, _NORTH_AMERICAN, _is_phone("US")),
        Mask(_SEVEN_DIGITS, _CHINESE_LANDLINE, _is_phone("CN")),
    ],
}
"""What is searched for, in this order."""
