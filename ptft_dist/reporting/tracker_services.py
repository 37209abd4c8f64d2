"""What is particular to each experiment tracker; reporting/trackers.py writes metrics to them."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from ptft_dist.config.secrets import hide

CLOSE_TIMEOUT_S = 120.0
"""How long the end of a run waits for a tracker."""
Received = Callable[[str, int], bool]
"""(tag, update) -> whether the tracker has this point already."""


class Service:
    """What is particular to one tracker. The rest is Accelerate's class for it."""

    key: ClassVar[str]
    title: ClassVar[str]
    module: ClassVar[str]
    remedy: ClassVar[str] = "check its login and server"
    fixed_configuration: ClassVar[bool] = False
    """The configuration of a run can be written only once."""

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
    fixed_configuration = True
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
