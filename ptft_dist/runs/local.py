"""Executes runs on this machine: each is a `ptft train` process of its own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType

from ptft_dist.errors import EXIT_STOPPED
from ptft_dist.reporting.messages import say
from ptft_dist.runs.run_list import Run

SIGNALS = (signal.SIGTERM, signal.SIGINT)
COMMAND = (sys.executable, "-m", "ptft_dist", "train")


class LocalExecutor:
    """Starts one process after the other, and forwards signals to the one that runs."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._process: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Forward SIGTERM and SIGINT to the running process and start no other; afterwards they do what they did
        before. In a thread other than the main one, Python cannot receive signals: they do what they did before."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __call__(self, run: Run, options: Sequence[str]) -> int:
        """Train one run; its exit code. 75 if a signal stopped it, or came before it was started."""
        if self.stop_requested:
            return EXIT_STOPPED
        say(f"{run.name}: training in {run.run_dir}")
        # In a session of its own, so that Ctrl-C in a terminal reaches it once: forwarded from here.
        self._process = subprocess.Popen([*COMMAND, *run.words, *options], start_new_session=True)
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
