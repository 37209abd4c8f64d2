"""The signals that ask a run to stop."""

from __future__ import annotations

import signal

STOP = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Slurm sends SIGTERM; many sites and job scripts warn with SIGUSR1 or SIGUSR2 instead."""
BY_A_LAUNCHER = "stopped by the launcher of"
"""How the text of a stop file begins that no person has written."""


def ignore_stop_signals() -> None:
    for number in STOP:
        signal.signal(number, signal.SIG_IGN)
