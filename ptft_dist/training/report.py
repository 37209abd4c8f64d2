"""The result of an update."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class UpdateReport:
    """The result of one optimizer update, the same on every rank. loss: mean over `count` labels, in nats."""

    step: int
    loss: float
    lr: float
    grad_norm: float | None
    count: int
    tokens: int
    stop: bool
    metrics: dict[str, float]
