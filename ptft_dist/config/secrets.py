"""Masks the values of environment variables in everything that is shown or written.

A recipe can read passwords and tokens from the environment (`${env:NAME}`). Any of these values may be secret, and
errors, tracebacks and warnings can quote them, for example as part of a path or URL. So all text output (terminal,
logs, result.json) passes through `hide`.
"""

from __future__ import annotations

import json
import logging
import urllib.parse
import warnings
from functools import cache
from typing import Any

SHORTEST = 4
"""Minimum length of a masked value, in characters. Masking shorter ones would make messages unreadable."""

_references: dict[str, str] = {}  # each form of a value (plain, quoted, escaped) -> the reference to show instead


def remember(value: str, reference: str) -> None:
    """Mask `value` from now on in this process by `reference`, such as `${env:HF_TOKEN}`."""
    if len(value) < SHORTEST:
        return
    for spelling in (value, repr(value)[1:-1], json.dumps(value)[1:-1], urllib.parse.quote(value, safe="")):
        _references[spelling] = reference


def forget() -> None:
    """Mask nothing from now on. For tests, which read many recipes in one process."""
    _references.clear()


def hide(text: str) -> str:
    """`text` with every value replaced by its reference."""
    for spelling in sorted(_references, key=len, reverse=True):  # longest first, because a value may contain another
        text = text.replace(spelling, _references[spelling])
    return text


@cache
def hide_in_libraries() -> None:
    """Pass warnings and log records of all libraries through `hide`. Takes effect once per process."""
    format_warning, make_record = warnings.formatwarning, logging.getLogRecordFactory()

    def hidden_warning(*args: Any, **kwargs: Any) -> str:
        return hide(format_warning(*args, **kwargs))

    def hidden_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        record.msg, record.args = hide(record.getMessage()), None
        return record

    warnings.formatwarning = hidden_warning
    logging.setLogRecordFactory(hidden_record)
