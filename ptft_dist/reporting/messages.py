"""Messages for users: the logger `ptft`, written to stderr.

Rank 0 shows all messages; other ranks show warnings, with their rank. Use `say`, `warn` or
`logging.getLogger("ptft")`; use `Progress` for long work.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from ptft_dist.config.secrets import hide

LOGGER = logging.getLogger("ptft")
_GONE = (errno.EPIPE, errno.EIO)
PLAIN_EVERY_S = 10.0
"""Seconds between progress lines without a terminal, so that logs stay short."""


def counted(count: int, noun: str) -> str:
    """`1 row`, `1,234 rows`."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def write_now(text: str, stream: TextIO, end: str = "\n") -> None:
    """Write to stdout or stderr. Training must not fail because of it: the terminal may be closed, its reader may have
    ended, as `tee` does at Ctrl-C, or the disk of a log may be full."""
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as error:
        _discard_if_gone(error, stream)


def _discard_if_gone(error: OSError, stream: TextIO) -> None:
    """Discard what follows if nobody can read it. Otherwise the interpreter fails when it flushes it at its end."""
    if error.errno in _GONE:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _LiveLine:
    """The last line of the terminal, which is replaced again and again. Messages are printed above it."""

    def __init__(self) -> None:
        self.text = ""

    def show(self, text: str) -> None:
        """Replace the line. An empty text shows none."""
        if text or self.text:
            write_now(f"\r\x1b[2K{text}", sys.stderr, end="")
        self.text = text

    def clear(self) -> str:
        """Remove the line; returns its text."""
        text = self.text
        self.show("")
        return text


LIVE = _LiveLine()


class _Format(logging.Formatter):
    """Plain lines for information, `warning: ...` for warnings, with the rank if it is not 0."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(message)s")
        self.prefix = f"[rank {rank}] " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno == logging.CRITICAL:  # see `fail`
            return hide(super().format(record))
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return hide(f"{self.prefix}{level}{super().format(record)}")


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to the current sys.stderr, which a test or a notebook may replace."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        line = LIVE.clear()
        super().emit(record)
        LIVE.show(line)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            _discard_if_gone(error, self.stream)
        else:
            super().handleError(record)


def show_messages(rank: int = 0, *, quiet: bool = False) -> None:
    """Send the messages of this process to stderr, until `hide_messages`. quiet: warnings only."""
    _remove_handlers()
    handler = _Stderr()
    handler.setFormatter(_Format(rank))
    LOGGER.addHandler(handler)
    level = logging.WARNING if rank or quiet else logging.INFO
    if LOGGER.level != level:  # a change costs a millisecond, because thousands of loggers forget their levels
        LOGGER.setLevel(level)
    LOGGER.propagate = False


def hide_messages() -> None:
    """Undo `show_messages`."""
    _remove_handlers()
    LOGGER.setLevel(logging.NOTSET)
    LOGGER.propagate = True


def _remove_handlers() -> None:
    for handler in [handler for handler in LOGGER.handlers if isinstance(handler, _Stderr)]:
        LOGGER.removeHandler(handler)


def say(text: str) -> None:
    """Show a line of information."""
    LOGGER.info("%s", text)


def warn(text: str) -> None:
    """Show a warning: something is probably a mistake, or was lost."""
    LOGGER.warning("%s", text)


def fail(text: str) -> None:
    """Show the failure that ends this process, unchanged and on every rank."""
    LOGGER.critical("%s", text)


def messages_shown() -> bool:
    """Whether this process shows more than warnings."""
    return LOGGER.isEnabledFor(logging.INFO)


@contextlib.contextmanager
def messages(rank: int = 0, *, quiet: bool = False) -> Iterator[None]:
    """Show messages within the block, unless they are shown already."""
    if any(isinstance(handler, _Stderr) for handler in LOGGER.handlers):
        yield
        return
    show_messages(rank, quiet=quiet)
    try:
        yield
    finally:
        hide_messages()


class Progress:
    """Progress of long work: a live line on a terminal, otherwise a plain line every ten seconds.

    Short work shows nothing. Ranks other than 0, and processes that hide messages, show nothing.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "") -> None:
        """what: for example "evaluating"; total: number of `unit`, if known. Bytes are shown as MB."""
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()
        self._before: str | None = None

    def advance(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.shown < (0.5 if self.live else PLAIN_EVERY_S) or not messages_shown():
            return
        self.shown = now
        if self.live:
            if self._before is None:
                self._before = LIVE.text
            LIVE.show(self._text(now))
        else:
            say(self._text(now))

    def close(self) -> None:
        if self._before is not None:
            LIVE.show(self._before)
            self._before = None

    def _text(self, now: float) -> str:
        share = f" of {self._amount(self.total)} ({self.done / self.total:.0%})" if self.total else ""
        unit = "MB" if self.unit == "bytes" else self.unit
        return f"{self.what}: {self._amount(self.done)}{share} {unit}".rstrip() + f", {clock(now - self.started)}"

    def _amount(self, count: int) -> str:
        return f"{count / 1e6:,.1f}" if self.unit == "bytes" else f"{count:,}"


@contextlib.contextmanager
def progress(what: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
    """A Progress that is closed at the end of the block."""
    shown = Progress(what, total, unit)
    try:
        yield shown
    finally:
        shown.close()


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def plain(value: Any) -> str:
    """Format a number for the terminal."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
