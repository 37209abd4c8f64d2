"""How a process ends that is one rank of several."""

from __future__ import annotations


def end_at_signal(what: str, signal_name: str) -> None:
    """Exit immediately, because there is nothing to save. Exit code 75 if the job is requeued.

    what: what the signal interrupts, for the message.
    """
    import signal

    from ptft_dist.errors import EXIT_STOPPED
    from ptft_dist.launch.environment import is_requeued, tell_launcher
    from ptft_dist.reporting.messages import say

    say(f"stopped by {signal_name} {what}")
    code = EXIT_STOPPED if is_requeued() else 128 + signal.Signals[signal_name]
    tell_launcher(code)
    end(code)


def end(code: int) -> None:
    """Exit without interpreter shutdown.

    After a failure, other ranks may wait in a collective, and leaving the process group would wait for them. After a
    success, see Engine.close.
    """
    import multiprocessing
    import os
    import sys

    for reader in multiprocessing.active_children():
        reader.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
