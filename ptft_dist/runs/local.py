"""Executes runs and stages on this machine, each as a separate `ptft` process."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from ptft_dist.errors import EXIT_STOPPED
from ptft_dist.reporting.messages import say
from ptft_dist.signals import STOP

SIGNALS = (*STOP, signal.SIGINT)
COMMAND = (sys.executable, "-m", "ptft_dist")


class Command(Protocol):
    """A command that makes something in a directory of its own: a run, or a stage of a pipeline."""

    @property
    def name(self) -> str: ...

    @property
    def run_dir(self) -> Path: ...

    @property
    def command(self) -> list[str]: ...


class LocalExecutor:
    """Starts one process after the other, and forwards signals to the one that runs."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Forward signals to the running process and start no other one; restore the handlers afterwards.

        No effect outside of the main thread, because Python cannot receive signals there.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __call__(self, run: Command, options: Sequence[str]) -> int:
        """Run one command; its exit code. 75 if a signal stopped it, or came before it was started."""
        if self.stop_requested:
            return EXIT_STOPPED
        say(f"{run.name}: {run.run_dir}")
        # A new session, so that the process gets Ctrl-C once: forwarded from here.
        self._process = subprocess.Popen([*COMMAND, *run.command, *options], start_new_session=True)
        if self.stop_requested:  # the signal came between the two lines above
            self._process.terminate()
        code = self._process.wait()
        self._process = None
        code = code if code >= 0 else 128 - code
        stopped_by_signal = code in [128 + number for number in SIGNALS]  # before its training had begun
        return EXIT_STOPPED if self.stop_requested and stopped_by_signal else code

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.stop_requested = True
        if self._process is not None:
            self._process.send_signal(number)
