"""How commands run as one rank of several, and how they end at a signal that comes before they have saved anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

LAUNCH = "A launch config: a file, or a shipped one such as multi_gpu, zero3, cpu."
PROCESSES = "Processes on this machine."


def launched(launch: str | None, processes: int | None, words: Sequence[str]) -> int | None:
    """Run `ptft WORDS` in several processes by a launch config; the exit code. None if neither option is given.

    Raises:
        RecipeError: this is one of the processes already, or the launch config is no valid one.
    """
    if launch is None and processes is None:
        return None
    import os

    from ptft_dist.errors import RecipeError
    from ptft_dist.launch.environment import place
    from ptft_dist.launch.launch_file import read_launch_file
    from ptft_dist.launch.local import command, default_launch, local_processes, run_ranks

    if place().launched:
        raise RecipeError("--launch, --processes: no effect in a process that a launcher has started")
    file = read_launch_file(launch or default_launch())
    count = local_processes(file, processes, None)
    return run_ranks(
        command(file, processes, None, words), max(1, len(os.sched_getaffinity(0)) // count), file.variables
    )


def run_as_rank(
    call: Callable[[], T], show: Callable[[T], None], subject: Path, at_signal: Callable[[str], None]
) -> None:
    """Run `call` as the only process or as one rank of several, and show its result once.

    A failure is reported once, by the rank that fails first.

    Args:
        subject: what the command works on, for the report of a failure.
        at_signal: called with the name of a signal; ends the process.
    """
    from ptft_dist.launch.ending import end_now
    from ptft_dist.launch.environment import place
    from ptft_dist.training.stopping import ending_at_once

    here = place()
    with ending_at_once(at_signal):
        if here.world_size == 1:
            show(call())
            return
        from ptft_dist.failures import Failures

        failures = Failures(subject, here)
        try:
            result = call()
        except Exception as error:
            failures.report_error(error)
            end_now(failures.exit_code)
        if here.is_main:
            show(result)
        end_now(0)


def end_at_signal(what: str, signal_name: str) -> None:
    """Exit immediately, because there is nothing to save. Exit code 75 if the job is requeued.

    what: what the signal interrupts, for the message.
    """
    import signal

    from ptft_dist.errors import EXIT_STOPPED
    from ptft_dist.launch.ending import end_now
    from ptft_dist.launch.environment import may_be_requeued, tell_launcher
    from ptft_dist.reporting.messages import say

    say(f"stopped by {signal_name} {what}")
    code = EXIT_STOPPED if may_be_requeued() else 128 + signal.Signals[signal_name]
    tell_launcher(code)
    end_now(code)
