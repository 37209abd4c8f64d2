"""The section `log` of a recipe: metrics, TensorBoard, experiment trackers and the report."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from ptft_dist.config.section import Section, Text


class TrackerSection(Section):
    """A run in an experiment tracker. Its credentials come from its login or from environment variables."""

    project: Text = "ptft"
    """The project of the run."""
    name: Text | None = None
    """The name that is shown. Default: the last part of run_dir."""


class WandbSection(TrackerSection):
    """Weights & Biases. Needs `pip install 'ptft_dist[wandb]'`."""

    entity: Text | None = None
    """The user or team. Default: that of the login."""
    group: Text | None = None
    """A group of runs, such as the trials of a sweep."""
    tags: tuple[Text, ...] = ()
    """Tags of the run."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to run_dir/wandb; upload it with `wandb sync` after the run."""


class MlflowSection(TrackerSection):
    """MLflow. Needs `pip install 'ptft_dist[mlflow]'`. `project` is the experiment."""

    uri: Text | None = None
    """A server or a database. Default: MLFLOW_TRACKING_URI, or MLflow's own default, sqlite:///mlflow.db."""


class TrackioSection(TrackerSection):
    """trackio. Needs `pip install 'ptft_dist[trackio]'`. Runs are on this machine: `trackio show`."""

    space: Text | None = None
    """A Space of the Hub that gets the metrics instead."""


class SwanlabSection(TrackerSection):
    """SwanLab. Needs `pip install 'ptft_dist[swanlab]'`."""

    workspace: Text | None = None
    """The user or organization. Default: that of the login."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to run_dir/swanlab; upload it with `swanlab sync` after the run."""


class CometSection(TrackerSection):
    """Comet. Needs `pip install 'ptft_dist[comet]'`."""

    workspace: Text | None = None
    """The user or team. Default: that of the login."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to run_dir/comet; upload it with `comet upload` after the run."""


class LogSection(Section):
    """Logging. metrics.jsonl is always written."""

    every: PositiveInt = 1
    """Log to metrics.jsonl, TensorBoard and trackers every this many updates."""
    tensorboard: bool = True
    """Write TensorBoard events to run_dir/tensorboard."""
    wandb: WandbSection | None = None
    """Weights & Biases, such as {project: my-project}; {} takes the defaults."""
    mlflow: MlflowSection | None = None
    """MLflow."""
    trackio: TrackioSection | None = None
    """trackio."""
    swanlab: SwanlabSection | None = None
    """SwanLab."""
    comet: CometSection | None = None
    """Comet."""
    report: bool = True
    """Write run_dir/report.html at the end, a page with plots (5 MB). `ptft report` writes it at any time."""

    @property
    def trackers(self) -> dict[str, TrackerSection]:
        """The trackers of this run by their key."""
        keys = ("wandb", "mlflow", "trackio", "swanlab", "comet")
        return {key: section for key in keys if (section := getattr(self, key)) is not None}
