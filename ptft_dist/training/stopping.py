"""Stop requests: the signals of signals.py, a file named `stop` in the run directory, or the end of the job.

During training a signal handler only sets a flag. The ranks sum their flags together with the counts of each update,
so that all of them stop after the same update. Before training there is nothing to save: the process exits at once,
even while it waits in C code for other processes. After training, while the model is exported or a failure is
reported, signals are ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ptft_dist.signals import BY_A_LAUNCHER, SIGNALS, handle_signals

LOOK_EVERY_S = 1.0  # the stop file may be on a slow shared disk

MARGIN_S = 30.0
"""Seconds for what follows a save: the end of the processes, and of the job."""


@dataclass
class Deadline:
    """The end of the job. A run stops so early that a save of twice the longest duration so far still fits in.

    Until a save has been measured, only the signal that Slurm sends before the end stops the run.
    """

    end: float
    """Seconds since 1970."""
    longest_save_s: float = 0.0
    last_phase_s: float = 0.0
    """A run stops only between phases."""

    def is_near(self) -> bool:
        """Whether a run that is not stopped now could be too late."""
        lead_s = MARGIN_S + 2 * (self.longest_save_s + self.last_phase_s)
        return self.longest_save_s > 0 and time.time() > self.end - lead_s


class StopRequest:
    """Whether this run was asked to stop, and by what."""

    def __init__(self, stop_file: Path | None, token: str = "", end: float | None = None) -> None:
        """Listen to nothing yet; see `listening`.

        Args:
            stop_file: checked by this rank; None on all ranks but one, which learn of it from the next sum.
            token: what the launchers of this start write into the file.
            end: when the job ends, in seconds since 1970; None on all ranks but one, and outside of jobs.
        """
        self.stop_file, self.token = stop_file, token
        self.deadline = None if end is None else Deadline(end)
        self.reason: str | None = None
        self._looked = -LOOK_EVERY_S

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals, and restore the previous handlers afterwards. A second SIGINT interrupts as usual.

        Only the main thread can handle signals; in another thread only the stop file works.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        global _training_began
        before = handle_signals(self._on_signal)
        _training_began = True
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = signal.Signals(number).name

    def requested(self) -> bool:
        now = time.monotonic()
        if self.reason is None and self.stop_file is not None and now - self._looked >= LOOK_EVERY_S:
            self._looked = now
            if self._is_meant(self.stop_file):
                self.reason = f"the file {self.stop_file}"
        if self.reason is None and self.deadline is not None and self.deadline.is_near():
            self.reason = f"the end of the job at {time.strftime('%H:%M:%S', time.localtime(self.deadline.end))}"
        return self.reason is not None

    def took(self, *, save_s: float = 0.0, phase_s: float | None = None) -> None:
        """Learn how long a save, or the updates of a phase, have taken."""
        if self.deadline is not None:
            self.deadline.longest_save_s = max(self.deadline.longest_save_s, save_s)
            self.deadline.last_phase_s = self.deadline.last_phase_s if phase_s is None else phase_s

    def _is_meant(self, stop_file: Path) -> bool:
        """Whether there is a stop file for this start. The file of an earlier start, whose launcher was killed before
        it could remove it, is removed."""
        try:
            text = stop_file.read_text(encoding="utf-8", errors="replace").strip()
        except FileNotFoundError:
            return False
        if text == self.token or not text.startswith(BY_A_LAUNCHER):
            return True
        stop_file.unlink(missing_ok=True)
        return False

    def fulfilled(self) -> None:
        """Remove the stop file after the run has stopped, so that the next start can train."""
        if self.stop_file is not None:
            self.stop_file.unlink(missing_ok=True)


_ending_at_once = False
_training_began = False  # from then on a StopRequest handles the signals, and afterwards nothing does


def _in_forked_child() -> None:
    """Detach a forked worker from the signal socket: a signal to the worker must not reach its parent."""
    if _ending_at_once:
        signal.set_wakeup_fd(-1)
        handle_signals(signal.SIG_DFL)  # type: ignore[arg-type]


os.register_at_fork(after_in_child=_in_forked_child)


@contextlib.contextmanager
def ending_at_once(end: Callable[[str], None]) -> Iterator[None]:
    """Call `end(signal name)` at these signals until a StopRequest handles them.

    A separate thread calls it, so that it works while the main thread waits in C code. Without effect outside of the
    main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _ending_at_once, _training_began
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    # The handler only prevents KeyboardInterrupt; the thread does the work.
    before = handle_signals(lambda _number, _frame: None)
    _ending_at_once, _training_began = True, False

    def watch() -> None:
        while received := reader.recv(1):
            if received[0] in SIGNALS and not _training_began:
                end(signal.Signals(received[0]).name)

    threading.Thread(target=watch, daemon=True, name="signals").start()
    try:
        yield
    finally:
        _ending_at_once = False
        signal.set_wakeup_fd(previous_fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()
