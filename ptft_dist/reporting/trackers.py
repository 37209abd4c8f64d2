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
import logging
import os
import queue
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ptft_dist.config.load import Loaded, flat, public_values
from ptft_dist.config.log_section import LogSection, TrackerSection
from ptft_dist.config.secrets import hide
from ptft_dist.errors import RecipeError
from ptft_dist.reporting.messages import say, warn
from ptft_dist.reporting.metrics import METRICS, scalars
from ptft_dist.reporting.output import write_text

IDS = "trackers.json"
START_TIMEOUT_S = 180.0
CLOSE_TIMEOUT_S = 120.0

MakeTracker = Callable[[str, str, Mapping[str, Any]], Any]
"""(key, project, arguments) -> a GeneralTracker of Accelerate that has not started."""
Received = Callable[[str, int], bool]
"""(tag, update) -> whether the tracker has this point already."""


class Service:
    """What is particular to one tracker. The rest is Accelerate's class for it."""

    key: ClassVar[str]
    title: ClassVar[str]
    module: ClassVar[str]
    remedy: ClassVar[str] = "check its login and server"

    def __init__(self, section: Any, run_dir: Path, run_id: str, *, known: bool) -> None:
        """run_id: the id of the run in the tracker. known: an earlier start had this id."""
        self.section, self.run_dir, self.run_id, self.known = section, run_dir, run_id, known
        self.name: str = hide(section.name or run_dir.resolve().name)

    def arguments(self) -> dict[str, Any]:
        """The arguments with which the tracker starts."""
        raise NotImplementedError

    def drop_local_copy(self) -> None:
        """Delete what an earlier start of this run has written on this machine."""

    def started(self, tracker: Any) -> None:
        """Called once after the start, for example to learn the id."""

    def received(self, tracker: Any) -> Received:  # noqa: ARG002
        """What the tracker has of this run."""
        return lambda _tag, _step: False

    def place(self, tracker: Any) -> str:  # noqa: ARG002
        """Where the run is shown or stored."""
        if getattr(self.section, "mode", "online") == "offline":
            return str(self.run_dir / self.key)
        return f"project {self.section.project}"


class Wandb(Service):
    key, title, module = "wandb", "Weights & Biases", "wandb"
    remedy = "run `wandb login`, or set log.wandb.mode: offline"

    def arguments(self) -> dict[str, Any]:
        section = self.section
        return {
            "id": self.run_id,
            "name": self.name,
            "resume": "allow" if section.mode == "online" else None,  # has no effect offline
            "mode": section.mode,
            "entity": section.entity,
            "group": section.group,
            "tags": section.tags or None,
            "dir": str(self.run_dir),
            # No copy of the terminal and no code: they may contain what `hide` masks.
            "settings": {"silent": True, "console": "off", "save_code": False, "finish_timeout": CLOSE_TIMEOUT_S / 2},
        }

    def drop_local_copy(self) -> None:
        _remove(self.run_dir / "wandb", f"offline-run-*-{self.run_id}")

    def received(self, tracker: Any) -> Received:
        first_missing = tracker.tracker.starting_step  # 0 for a new run, and offline
        return lambda _tag, step: step < first_missing

    def place(self, tracker: Any) -> str:
        return super().place(tracker) if self.section.mode == "offline" else str(tracker.tracker.url)


class Mlflow(Service):
    key, title, module = "mlflow", "MLflow", "mlflow"
    remedy = "check log.mlflow.uri, or MLFLOW_TRACKING_URI"

    def arguments(self) -> dict[str, Any]:
        import mlflow

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)  # each creation of a table
        if self.section.uri is not None:
            mlflow.set_tracking_uri(self.section.uri)
        return {"run_id": self.run_id if self.known else None, "run_name": self.name}

    def started(self, tracker: Any) -> None:
        self.run_id = tracker.tracker.info.run_id

    def received(self, tracker: Any) -> Received:  # noqa: ARG002
        import mlflow

        client = mlflow.MlflowClient()
        last = {
            tag: max(point.step for point in client.get_metric_history(self.run_id, tag))
            for tag in client.get_run(self.run_id).data.metrics
        }
        return lambda tag, step: step <= last.get(tag, -1)

    def place(self, tracker: Any) -> str:  # noqa: ARG002
        import mlflow

        return f"{mlflow.get_tracking_uri()}, experiment {self.section.project}"


class Trackio(Service):
    key, title, module = "trackio", "trackio", "trackio"
    remedy = "check log.trackio.space and the login of the Hub (`hf auth login`)"

    @property
    def run_name(self) -> str:
        """trackio finds a run by its name, so it contains the id."""
        return f"{self.name}-{self.run_id[:6]}"

    @property
    def remote(self) -> bool:
        return bool(self.section.space or {"TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"} & os.environ.keys())

    def arguments(self) -> dict[str, Any]:
        resume = "allow" if self.remote else "never"
        return {"name": self.run_name, "resume": resume, "space_id": self.section.space, "embed": False}

    def drop_local_copy(self) -> None:
        import trackio

        if self.remote:
            return
        with contextlib.suppress(ValueError):  # the user has deleted the project
            for run in [run for run in trackio.Api().runs(self.section.project) if run.name == self.run_name]:
                run.delete()

    def received(self, tracker: Any) -> Received:
        last = tracker.tracker._initial_last_step if self.remote and self.known else None
        return lambda _tag, step: last is not None and step <= last


class Swanlab(Service):
    key, title, module = "swanlab", "SwanLab", "swanlab"
    remedy = "run `swanlab login`, or set log.swanlab.mode: offline"

    def arguments(self) -> dict[str, Any]:
        import swanlab

        section = self.section
        return {
            "id": self.run_id,
            "name": self.name,
            "settings": swanlab.Settings(terminal={"proxy_type": "none"}),  # no copy of the terminal
            "resume": "allow",  # its server refuses points that it has
            "mode": section.mode,
            "workspace": section.workspace,
            "log_dir": str(self.run_dir / "swanlab"),
        }

    def drop_local_copy(self) -> None:
        _remove(self.run_dir / "swanlab", f"run-*-{self.run_id}")


class Comet(Service):
    key, title, module = "comet", "Comet", "comet_ml"
    remedy = "set COMET_API_KEY, or log.comet.mode: offline"

    def arguments(self) -> dict[str, Any]:
        import comet_ml

        logging.getLogger("comet_ml").setLevel(logging.ERROR)
        quiet: dict[str, Any] = {"log_code": False, "log_git_patch": False, "parse_args": False}
        quiet |= {"auto_output_logging": False, "auto_param_logging": False, "auto_metric_logging": False}
        quiet["display_summary_level"] = 0
        config = comet_ml.ExperimentConfig(offline_directory=str(self.run_dir / "comet"), name=self.name, **quiet)
        online = self.section.mode == "online"
        return {
            "workspace": self.section.workspace,
            "experiment_key": self.run_id,
            "mode": "get_or_create",
            "online": online,
            "experiment_config": config,
        }

    def drop_local_copy(self) -> None:
        _remove(self.run_dir / "comet", f"{self.run_id}-*")

    def received(self, tracker: Any) -> Received:  # noqa: ARG002
        if not self.known or self.section.mode == "offline":
            return lambda _tag, _step: False
        import comet_ml

        points = comet_ml.API().get_experiment_by_key(self.run_id).get_metrics()
        has = {(point["metricName"], int(point["step"])) for point in points if point["step"] is not None}
        return lambda tag, step: (tag, step) in has


SERVICES: dict[str, type[Service]] = {each.key: each for each in (Wandb, Mlflow, Trackio, Swanlab, Comet)}


def _remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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
        if not service.known or service.key != "mlflow":  # whose parameters never change
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


__all__ = ["SERVICES", "Service", "Tracker", "TrackerSection", "check_installed", "open_trackers"]
