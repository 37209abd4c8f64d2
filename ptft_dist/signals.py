"""The signals that ask a run to stop."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Slurm sends SIGTERM; many sites and job scripts warn with SIGUSR1 or SIGUSR2 instead. A terminal that is closed, or
whose connection is lost, sends SIGHUP."""
SIGNALS = (*STOP, signal.SIGINT)
"""The last one is that of Ctrl-C."""
BY_A_LAUNCHER = "stopped by the launcher of"
"""How the text of a stop file begins that no person has written."""


def handle_signals(handler: Callable[[int, FrameType | None], Any]) -> dict[signal.Signals, Any]:
    """Handle SIGNALS; return the handlers before. A SIGHUP that `nohup` made this process ignore stays ignored."""
    handled = [each for each in SIGNALS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


def ignore_stop_signals() -> None:
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)
