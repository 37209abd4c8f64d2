"""The main text of HTML pages."""

from __future__ import annotations

import logging
import re
from typing import ClassVar

import trafilatura

from ptft_dist.config.cleaning import HtmlStep
from ptft_dist.data.cleaning.text_step import Cleaned

_BEGINS_WITH_TAG = re.compile(
    r"[\s\ufeff]*(?:<\?xml[^>]*>\s*|<!--(?:(?!-->).)*-->\s*)*"
    r"<(?:!doctype\s+html|html|head|body|title|meta|link|script|style|header|nav|main|article|section|aside|div|p|h[1-6]"
    r"|span|a|table|ul|ol|dl|blockquote|pre|img|form|font|center)\b[^<>]*>",
    re.IGNORECASE | re.DOTALL,
)
_HTML_TAG = re.compile(r"<html\b[^<>]*>", re.IGNORECASE)
_BODY_TAG = re.compile(r"<body\b[^<>]*>", re.IGNORECASE)
_SURROGATE = re.compile("[\x00\ud800-\udfff]")  # libxml2 ends the text there


class Html:
    """The main text of a page by trafilatura (Barbaresi 2021), which favours precision, as FineWeb does.

    A text is HTML if it begins with a tag, or has <html> and <body> further on. Other text is kept as it is.
    """

    libraries: ClassVar[tuple[str, ...]] = ("trafilatura", "lxml", "justext", "courlan", "htmldate")
    edits: ClassVar[bool] = True

    def __init__(self, settings: HtmlStep) -> None:
        self._comments, self._tables = settings.comments, settings.tables
        logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it logs every page that it cannot parse

    def __call__(self, text: str) -> Cleaned:
        if not is_html(text):
            return Cleaned(text)
        main = trafilatura.extract(
            _SURROGATE.sub("", text),
            favor_precision=True,
            include_comments=self._comments,
            include_tables=self._tables,
            deduplicate=False,
            with_metadata=False,
        )
        return Cleaned(main) if main else Cleaned(text, dropped="html: no main text")


def is_html(text: str) -> bool:
    """Whether a text is an HTML page or a part of one, rather than text with a tag in it."""
    if _BEGINS_WITH_TAG.match(text):
        return True
    page = _HTML_TAG.search(text)
    return page is not None and _BODY_TAG.search(text, page.end()) is not None
