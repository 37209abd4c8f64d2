"""The steps that look at one text at a time, by the classes of their settings."""

from __future__ import annotations

from pathlib import Path

from ptft_dist.config import cleaning as settings_of
from ptft_dist.config.section import Section
from ptft_dist.data.cleaning.text_step import TextStep


def text_step(settings: Section, base: Path) -> TextStep:
    """The step with these settings; `exact_dedup` and `near_dedup` are none. Libraries are imported here.

    Args:
        base: the recipe's directory, where relative paths start.

    Raises:
        RecipeError, DataError: a setting is wrong, or a file that it names cannot be read.
    """
    match settings:
        case settings_of.HtmlStep():
            from ptft_dist.data.cleaning.html import Html

            return Html(settings)
        case settings_of.UnicodeStep():
            from ptft_dist.data.cleaning.unicode import Unicode

            return Unicode(settings)
        case settings_of.WhitespaceStep():
            from ptft_dist.data.cleaning.whitespace import Whitespace

            return Whitespace(settings)
        case settings_of.ControlStep():
            from ptft_dist.data.cleaning.control import Control

            return Control()
        case settings_of.LanguageStep():
            from ptft_dist.data.cleaning.language import Language

            return Language(settings)
        case settings_of.QualityStep():
            from ptft_dist.data.cleaning.quality import Quality

            return Quality(settings)
        case settings_of.PiiStep():
            from ptft_dist.data.cleaning.pii import Pii

            return Pii(settings)
        case settings_of.RepetitionStep():
            from ptft_dist.data.cleaning.repetition import Repetition

            return Repetition()
        case settings_of.DecontaminateStep():
            from ptft_dist.data.cleaning.decontaminate import Decontaminate

            return Decontaminate(settings, base)
        case settings_of.CustomStep():
            from ptft_dist.data.cleaning.custom import Custom

            return Custom(settings, base)
    raise TypeError(f"{type(settings).__name__} is no step of single texts")
