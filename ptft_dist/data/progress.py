"""Progress of everything that lasts: a moving line on a terminal, otherwise plain lines from time to time."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[[str], None]
"""Takes one line of text for the user."""
Advance = Callable[[int], None]
"""Takes the number of bytes that were done since the last call."""

_EVERY_S = 30.0


def to_stderr(line: str) -> None:
    """Through the one place of messages: see reporting/messages.py."""
    logging.getLogger("ptft").info("%s", line)


def silence(_line: str) -> None:
    """For all processes but the one that speaks for them."""


class Progress:
    """Tells the user what is going on, or nothing with `Progress(silence)`."""

    def __init__(self, tell: Tell = to_stderr) -> None:
        self.tell = tell

    @contextmanager
    def measure(self, what: str, total_bytes: int | None = None) -> Iterator[Advance]:
        """Show how many bytes are done, for example `measure("encoding")`; yields the function that counts them."""
        if self.tell is silence:
            yield lambda _: None
        elif sys.stderr.isatty():
            with _moving_line(what, total_bytes) as advance:
                yield advance
        else:
            yield from self._plain_lines(what, total_bytes)

    def _plain_lines(self, what: str, total_bytes: int | None) -> Iterator[Advance]:
        """A line at the start, every 30 seconds, and at the end."""
        done, started = 0, time.monotonic()
        told = started
        of = "" if total_bytes is None else f" of {total_bytes / 1e6:,.1f}"

        def advance(size_bytes: int) -> None:
            nonlocal done, told
            done += size_bytes
            if (now := time.monotonic()) - told > _EVERY_S:
                told = now
                self.tell(f"{what}: {done / 1e6:,.1f}{of} MB after {now - started:,.0f} s")

        self.tell(f"{what} ...")
        yield advance
        self.tell(f"{what}: {done / 1e6:,.1f} MB in {time.monotonic() - started:,.1f} s")


@contextmanager
def _moving_line(what: str, total_bytes: int | None) -> Iterator[Advance]:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeElapsedColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total_bytes)
        yield lambda size_bytes: bar.advance(task, size_bytes)
