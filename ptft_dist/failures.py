"""What follows when a start fails on this rank, by an error or because another machine is gone."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

from ptft_dist.config.secrets import hide
from ptft_dist.engine import STORE_GONE, Engine, Loss, Machines, announce_failure, first_failure, watch_machines
from ptft_dist.errors import (
    EXIT_FAILED,
    EXIT_LOST,
    Failure,
    MachineLostError,
    exit_code_of,
    is_hardware_fault,
    is_network_failure,
)
from ptft_dist.launch.ending import end_now
from ptft_dist.launch.environment import Place
from ptft_dist.reporting.messages import warn
from ptft_dist.reporting.run_files import FailureReport

KNOWN_WITHIN_S = 2.0
"""The end of a machine's connection is noticed at once; only that of a silent machine takes longer."""


class Failures:
    """Announces the failure of this rank, tells the other machines, reports it, and sorts it.

    The failure that was announced first decides the exit code of those that follow from it.
    """

    def __init__(self, run_dir: Path, place: Place) -> None:
        self.place, self.report, self.exit_code = place, FailureReport(run_dir, place), EXIT_FAILED
        self.machines: Machines | None = None
        self._started, self._host = time.monotonic(), socket.gethostname()

    @property
    def wall_s(self) -> float:
        return time.monotonic() - self._started

    def watch_machines(self, engine: Engine) -> None:
        """Notice from now on when another machine of the run is gone. All ranks must call it."""
        self.machines = watch_machines(engine.rank, engine.gather_objects, self._end_after, warn)

    def over(self) -> None:
        """The run has ended without a failure."""
        if self.machines is not None:
            self.machines.close()

    def report_error(self, error: Exception) -> None:
        """Report an error of the main thread. `exit_code` is then that of this rank."""
        code, text = exit_code_of(error), hide(f"{type(error).__name__}: {error}")
        announce_failure(Failure(self.place.rank, self._host, code, text))
        cause, loss = first_failure(), None
        if cause is not None and cause.rank == self.place.rank:
            cause = None
        if self.machines is not None:
            self.machines.take_over()
            if is_network_failure(error):
                loss = self.machines.known_loss(KNOWN_WITHIN_S)
            if loss is not None and cause == STORE_GONE:
                cause = None if loss.hosts else cause._replace(exit_code=loss.exit_code)
        self.exit_code = code = exit_code_of(error, None if cause is None else cause.exit_code)
        if self.machines is not None:
            self.machines.failed(code)
        lost = (self._host,) if is_hardware_fault(error) else loss.hosts if loss is not None else ()
        self.report.write(error, code, self.wall_s, cause, lost if code == EXIT_LOST else ())

    def _end_after(self, loss: Loss) -> None:
        """End this process, whose main thread waits for a process that is gone."""
        cause = _first_failure_within(KNOWN_WITHIN_S)
        if cause == STORE_GONE:
            cause = None
        code = loss.exit_code if cause is None else cause.exit_code
        hosts = loss.hosts if code == EXIT_LOST else ()
        self.report.write(MachineLostError(loss.how), code, self.wall_s, cause, hosts)
        end_now(code)


def _first_failure_within(wait_s: float) -> Failure | None:
    """The failure that was announced first; None if there is none, or if its store does not answer."""
    answer: list[Failure | None] = []
    asking = threading.Thread(target=lambda: answer.append(first_failure()), daemon=True)
    asking.start()
    asking.join(wait_s)
    return answer[0] if answer else None
