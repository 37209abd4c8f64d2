"""How a command ends at a signal that comes before it has anything to save."""

from __future__ import annotations


def end_at_signal(what: str, signal_name: str) -> None:
    """Exit immediately, because there is nothing to save. Exit code 75 if the job is requeued.

    what: what the signal interrupts, for the message.
    """
    import signal

    from ptft_dist.errors import EXIT_STOPPED
    from ptft_dist.launch.ending import end_now
    from ptft_dist.launch.environment import is_requeued, tell_launcher
    from ptft_dist.reporting.messages import say

    say(f"stopped by {signal_name} {what}")
    code = EXIT_STOPPED if is_requeued() else 128 + signal.Signals[signal_name]
    tell_launcher(code)
    end_now(code)
