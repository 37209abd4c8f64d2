"""Values of environment variables that recipes referred to, and their removal from everything that is shown or written.

A recipe takes passwords and tokens from the environment (`${env:NAME}`). Any of these values may be secret, and later
errors, tracebacks and warnings can quote them, for example as part of a path or URL. So every writer of text for people
(terminal, logs, result.json) passes its text through `hide`.
"""

from __future__ import annotations

import json
import logging
import urllib.parse
import warnings
from functools import cache
from typing import Any

SHORTEST = 4
"""A shorter value (in characters) is not secret, and hiding it would make messages unreadable."""

_references: dict[str, str] = {}  # every spelling of a value -> the reference to show instead


def remember(value: str, reference: str) -> None:
    """Hide `value` from now on, in this process; `reference`, such as `${env:HF_TOKEN}`, is shown instead."""
    if len(value) < SHORTEST:
        return
    for spelling in (value, repr(value)[1:-1], json.dumps(value)[1:-1], urllib.parse.quote(value, safe="")):
        _references[spelling] = reference


def forget() -> None:
    """Hide nothing any more. For tests: one process of theirs reads many recipes."""
    _references.clear()


def hide(text: str) -> str:
    """`text` with the reference in place of every value, however it is quoted."""
    for spelling in sorted(_references, key=len, reverse=True):  # a value may be part of another
        text = text.replace(spelling, _references[spelling])
    return text


@cache
def hide_in_libraries() -> None:
    """Let warnings and log records of all libraries go through `hide`; once in a process."""
    format_warning, make_record = warnings.formatwarning, logging.getLogRecordFactory()

    def hidden_warning(*args: Any, **kwargs: Any) -> str:
        return hide(format_warning(*args, **kwargs))

    def hidden_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        record.msg, record.args = hide(record.getMessage()), None
        return record

    warnings.formatwarning = hidden_warning
    logging.setLogRecordFactory(hidden_record)
