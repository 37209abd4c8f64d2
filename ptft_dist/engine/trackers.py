"""Accelerate's classes for experiment trackers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def make_tracker(kind: str, project: str, arguments: Mapping[str, Any]) -> Any:
    """A GeneralTracker of Accelerate that has not started.

    Args:
        kind: wandb, mlflow, trackio, swanlab or comet.
        arguments: keyword arguments of the tracker's own `init` or `start`.
    """
    from accelerate import tracking

    classes = {
        "wandb": tracking.WandBTracker,
        "mlflow": tracking.MLflowTracker,
        "trackio": tracking.TrackioTracker,
        "swanlab": tracking.SwanLabTracker,
        "comet": tracking.CometMLTracker,
    }
    return classes[kind](project, **arguments)
