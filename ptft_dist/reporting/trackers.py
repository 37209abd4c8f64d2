"""Experiment trackers as writers of metrics: Weights & Biases, MLflow, trackio, SwanLab and Comet.

A run of ptft is one run of the tracker, whose id is in run_dir/trackers.json. metrics.jsonl is what the tracker has to
show: each start first sends the rows that the tracker lacks, for example because the process was killed before they
were sent. Rows of updates that the tracker has already are not sent again. Two ways lead there:

- A tracker that tells which updates it has (MLflow, and the servers of the others) gets the others.
- The local copy of an earlier start (wandb and swanlab offline, comet offline, trackio) is incomplete after a kill, and
  cannot be continued. It is deleted, and all rows are written again.

All calls of a tracker run in one thread of its own, because a server that is away must not delay an update, and because
MLflow's and trackio's current run belong to a thread.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from ptft_dist.config.load import Loaded, flat, public_values
from ptft_dist.config.log_section import LogSection
from ptft_dist.config.secrets import hide
from ptft_dist.errors import RecipeError
from ptft_dist.reporting.messages import say, warn
from ptft_dist.reporting.metrics import METRICS, scalars
from ptft_dist.reporting.output import write_text
from ptft_dist.reporting.tracker_services import CLOSE_TIMEOUT_S, SERVICES, Received, Service

IDS = "trackers.json"
START_TIMEOUT_S = 180.0

MakeTracker = Callable[[str, str, Mapping[str, Any]], Any]
"""(key, project, arguments) -> a GeneralTracker of Accelerate that has not started."""


def check_installed(log: LogSection) -> None:
    """Raises RecipeError, with the command that installs it, if the package of a tracker is missing."""
    for key in log.trackers:
        if importlib.util.find_spec(SERVICES[key].module) is None:
            raise RecipeError(f"log.{key}: {SERVICES[key].title} is not installed: pip install 'ptft_dist[{key}]'")


def open_trackers(loaded: Loaded, make: MakeTracker, *, new_run: bool) -> list[Tracker]:
    """Start the trackers of a recipe. metrics.jsonl must have no rows after the checkpoint.

    Args:
        make: makes Accelerate's class for a tracker.
        new_run: begin new runs, because the curves differ from those of earlier starts.

    Raises:
        RecipeError: a tracker does not start, and no earlier start of this run had it. When one had, the tracker is
            left out with a warning, because an unattended resume must go on while a server is away.
    """
    run_dir = Path(loaded.recipe.run_dir)
    ids = {} if new_run else read_ids(run_dir)
    opened: list[Tracker] = []
    for key, section in loaded.recipe.log.trackers.items():
        known = key in ids
        service = SERVICES[key](section, run_dir, ids.get(key, uuid.uuid4().hex), known=known)
        tracker = Tracker(service, make)
        try:
            tracker.start(flat(public_values(loaded)))
        except Exception as error:
            text = f"log.{key}: {service.title} did not start: {_what(error)}"
            if not known:
                for each in opened:
                    each.close()
                raise RecipeError(f"{text}. {service.remedy[:1].upper()}{service.remedy[1:]}") from error
            warn(f"{text}. The run goes on without it; the next start sends what it lacks")
            continue
        ids[key] = service.run_id
        write_text(run_dir / IDS, json.dumps(ids, indent=1) + "\n")
        opened.append(tracker)
    return opened


def _what(error: Exception) -> str:
    text = str(error).strip().rstrip(".") or f"no answer within {START_TIMEOUT_S:.0f} s"  # a TimeoutError has no text
    return hide(f"{type(error).__name__}: {text}")


def read_ids(run_dir: Path) -> dict[str, str]:
    """The ids of this run in its trackers, by their key; empty if it has none, or the file is damaged."""
    try:
        ids = json.loads((run_dir / IDS).read_text(encoding="utf-8"))
        return {str(key): str(value) for key, value in ids.items()}
    except (OSError, ValueError, AttributeError):
        return {}


class Tracker:
    """A writer of metrics to one tracker. After an error the run continues without it, with a warning."""

    def __init__(self, service: Service, make: MakeTracker) -> None:
        self.service, self.make = service, make
        self.thread = _Thread(f"ptft-{service.key}")
        self.tracker: Any = None
        self.has: Received = lambda _tag, _step: False
        self.failed = False

    def start(self, config: Mapping[str, Any]) -> None:
        """Start the tracker, and send the rows of metrics.jsonl that it lacks. Raises what its package raises."""
        with contextlib.redirect_stdout(io.StringIO()):  # advertisements; stdout is for results
            self.thread.do(partial(self._start, config)).result(START_TIMEOUT_S)
        say(f"{self.service.title}: {hide(self.service.place(self.tracker))}")
        file = self.service.run_dir / METRICS
        size = file.stat().st_size if file.exists() else 0
        self._later(lambda: self._replay(file, size))

    def _start(self, config: Mapping[str, Any]) -> None:
        service, section = self.service, self.service.section
        if service.known:
            service.drop_local_copy()
        self.tracker = self.make(service.key, section.project, service.arguments())
        self.tracker.start()
        service.started(self.tracker)
        self.has = service.received(self.tracker)
        if not (service.known and service.fixed_configuration):
            self.tracker.store_init_configuration(dict(config))

    def _replay(self, file: Path, size: int) -> None:
        for row in _rows(file, size):
            self._send(row)

    def _send(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        values = {tag: value for tag, value in scalars(row).items() if not self.has(tag, step)}
        if values:
            self.tracker.log(values, step=step)

    def write(self, row: Mapping[str, Any]) -> None:
        self._later(lambda: self._send(row))

    def show(self, samples: Sequence[Mapping[str, Any]]) -> None:
        """Nothing: samples.jsonl and TensorBoard have the texts."""

    def flush(self) -> None:
        """Nothing: a resume sends what is missing."""

    def close(self) -> None:
        """Send the rest, and end the run of the tracker. Waits for a limited time."""
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self._later(lambda: self.tracker.finish()).result(CLOSE_TIMEOUT_S)
        except TimeoutError:
            warn(
                f"{self.service.title} did not take the last metrics within {CLOSE_TIMEOUT_S:.0f} s; "
                f"{self.service.run_dir / METRICS} has them"
            )

    def _later(self, action: Callable[[], None]) -> Future[None]:
        """Do this in the thread of the tracker."""

        def attempt() -> None:
            if self.failed:
                return
            try:
                action()
            except Exception as error:
                self.failed = True
                warn(
                    f"{self.service.title}: {_what(error)}. It gets no more metrics until the next "
                    f"start, which sends what it lacks; {self.service.run_dir / METRICS} has them"
                )

        return self.thread.do(attempt)


def _rows(file: Path, size: int) -> Iterator[dict[str, Any]]:
    """The rows in the first `size` bytes of metrics.jsonl."""
    if not size:
        return
    with file.open("rb") as lines:
        while lines.tell() < size:
            yield json.loads(lines.readline())


class _Thread:
    """A thread that does one job after the other. The process does not wait for it when it ends."""

    def __init__(self, name: str) -> None:
        self.jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    def do(self, job: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        self.jobs.put((job, future))
        return future

    def _work(self) -> None:
        while True:
            job, future = self.jobs.get()
            try:
                job()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(None)
