"""Stopping in order to go on later: SIGTERM, SIGINT, or a file named `stop` in the run directory.

A handler only sets a flag. The ranks add their flags up in the sum that every update makes anyway, so that all stop
after the same update; nothing is saved inside a handler.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

LOOK_EVERY_S = 1.0  # the stop file may lie on a slow shared disk


class StopRequest:
    def __init__(self, stop_file: Path | None) -> None:
        """stop_file: looked for by the rank that got it; the others learn of it with the next sum."""
        self.stop_file = stop_file
        self.reason: str | None = None
        self._looked = -LOOK_EVERY_S

    def listen(self) -> None:
        """Take SIGTERM and SIGINT. A second SIGINT ends the process as usual."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def requested(self) -> bool:
        now = time.monotonic()
        if self.reason is None and self.stop_file is not None and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            if self.stop_file.exists():
                self.reason = f"the file {self.stop_file}"
        return self.reason is not None

    def honoured(self) -> None:
        """The run has stopped: take the file away, so that the next start goes on."""
        if self.stop_file is not None:
            self.stop_file.unlink(missing_ok=True)
