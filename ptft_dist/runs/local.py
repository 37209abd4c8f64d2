"""Executes runs and stages on this machine, each as a separate `ptft` process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

from ptft_dist.errors import EXIT_STOPPED
from ptft_dist.reporting.messages import say
from ptft_dist.signals import SIGNALS, handle_signals

COMMAND = (sys.executable, "-m", "ptft_dist")
WATCH_EVERY_S = 1.0


class Command(Protocol):
    """A command that makes something in a directory of its own: a run, or a stage of a pipeline."""

    @property
    def name(self) -> str: ...

    @property
    def run_dir(self) -> Path: ...

    @property
    def command(self) -> list[str]: ...


class LocalExecutor:
    """Runs commands, and forwards signals to those that run. Several threads may call it."""

    def __init__(self) -> None:
        self.stop_requested = False
        self._processes: list[subprocess.Popen[bytes]] = []

    @contextlib.contextmanager
    def forwarding_signals(self) -> Iterator[None]:
        """Forward signals to the running processes and start no other one; restore the handlers afterwards.

        No effect outside of the main thread, because Python cannot receive signals there.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = handle_signals(self._on_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __call__(
        self,
        run: Command,
        options: Sequence[str],
        *,
        watch: Callable[[], None] | None = None,
        variables: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> int:
        """Run one command; its exit code. 75 if a signal stopped it, or came before it was started.

        Args:
            watch: called about every second while the command runs. If it raises, the command is stopped.
            variables: added to the environment of the command.
            log: the file that its output is added to. Default: the output goes to that of this process.
        """
        if self.stop_requested:
            return EXIT_STOPPED
        say(f"{run.name}: {run.run_dir}")
        # A new session, so that the process gets Ctrl-C once: forwarded from here.
        words, environment = [*COMMAND, *run.command, *options], {**os.environ, **(variables or {})}
        with open(log, "ab") if log is not None else contextlib.nullcontext() as output:  # noqa: PTH123
            process = subprocess.Popen(words, start_new_session=True, env=environment, stdout=output, stderr=output)
        self._processes.append(process)
        if self.stop_requested:  # the signal came between the lines above
            process.terminate()
        try:
            code = process.wait() if watch is None else _watched(process, watch)
        finally:
            self._processes.remove(process)
        code = code if code >= 0 else 128 - code
        stopped_by_signal = code in [128 + number for number in SIGNALS]  # before its training had begun
        return EXIT_STOPPED if self.stop_requested and stopped_by_signal else code

    def stop(self) -> None:
        """Ask the running processes to stop, and start no other one."""
        self._on_signal(signal.SIGTERM, None)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self.stop_requested = True
        for process in tuple(self._processes):
            process.send_signal(number)


def _watched(process: subprocess.Popen[bytes], watch: Callable[[], None]) -> int:
    while True:
        try:
            return process.wait(WATCH_EVERY_S)
        except subprocess.TimeoutExpired:
            pass
        try:
            watch()
        except BaseException:
            process.terminate()
            process.wait()
            raise
