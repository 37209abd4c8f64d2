"""The one place where lines for people come from: the standard library's logger `ptft`, written to stderr.

Rank 0 shows everything; other ranks show warnings, with their number. Whoever has something to say calls `say` or
`warn`, or `logging.getLogger("ptft")`. Work that lasts reports through `Progress`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from ptft_dist.config.secrets import hide

LOGGER = logging.getLogger("ptft")
PLAIN_EVERY_S = 10.0
"""Without a terminal, progress is a line this often, so that logs stay short."""


class _Format(logging.Formatter):
    """Plain lines for information, `warning: ...` for warnings, and the rank where it is not 0."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(message)s")
        self.prefix = f"[rank {rank}] " if rank else ""

    def format(self, record: logging.LogRecord) -> str:
        if record.levelno == logging.CRITICAL:  # see `fail`
            return hide(super().format(record))
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return hide(f"{self.prefix}{level}{super().format(record)}")


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at the time, also where a test or a notebook replaces it."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def show_messages(rank: int = 0, *, quiet: bool = False) -> None:
    """Send the messages of this process to stderr, until `hide_messages`. quiet: warnings only."""
    hide_messages()
    handler = _Stderr()
    handler.setFormatter(_Format(rank))
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.WARNING if rank or quiet else logging.INFO)
    LOGGER.propagate = False


def hide_messages() -> None:
    """Undo `show_messages`."""
    for handler in [handler for handler in LOGGER.handlers if isinstance(handler, _Stderr)]:
        LOGGER.removeHandler(handler)
    LOGGER.setLevel(logging.NOTSET)
    LOGGER.propagate = True


def say(text: str) -> None:
    """A line for the person who watches."""
    LOGGER.info("%s", text)


def warn(text: str) -> None:
    """A line about something that is probably not meant, or that was lost."""
    LOGGER.warning("%s", text)


def fail(text: str) -> None:
    """The failure that ends this process: shown as it is, from every rank."""
    LOGGER.critical("%s", text)


@contextlib.contextmanager
def messages(rank: int = 0, *, quiet: bool = False) -> Iterator[None]:
    """Show messages for a while, unless they are shown already."""
    if any(isinstance(handler, _Stderr) for handler in LOGGER.handlers):
        yield
        return
    show_messages(rank, quiet=quiet)
    try:
        yield
    finally:
        hide_messages()


class Progress:
    """How far a long piece of work is: a live line on a terminal, else a plain line every ten seconds.

    Short work shows nothing. On ranks other than 0, and where messages are hidden, there is no line.
    """

    def __init__(self, what: str, total: int | None = None, unit: str = "") -> None:
        """what: such as "evaluating"; total: of `unit`, if it is known."""
        self.what, self.total, self.unit = what, total, unit
        self.done = 0
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()
        self._line_is_open = False

    def advance(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.shown < (0.5 if self.live else PLAIN_EVERY_S) or not LOGGER.isEnabledFor(logging.INFO):
            return
        self.shown = now
        if self.live:
            print(f"\r\x1b[2K{self._text(now)}", end="", file=sys.stderr, flush=True)
            self._line_is_open = True
        else:
            say(self._text(now))

    def close(self) -> None:
        if self._line_is_open:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
            self._line_is_open = False

    def _text(self, now: float) -> str:
        share = f" of {self.total:,} ({self.done / self.total:.0%})" if self.total else ""
        return f"{self.what}: {self.done:,}{share} {self.unit}".rstrip() + f", {clock(now - self.started)}"


@contextlib.contextmanager
def progress(what: str, total: int | None = None, unit: str = "") -> Iterator[Progress]:
    """A Progress that is closed at the end."""
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
    """A number as the terminal shows it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
