"""Sums of losses and metrics over micro-batches, kept on the device until they are read together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


class Averages:
    """Sums of losses and metrics over the micro-batches of an update or an evaluation."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def add(self, loss_sum: torch.Tensor, metrics: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """loss_sum: a scalar, or [K] for a task with K losses. metrics: name -> (total, count)."""
        self.losses.append(loss_sum.detach().double().reshape(-1))
        for name, pair in metrics.items():
            self.pairs.setdefault(name, []).append(pair)

    def sums(self) -> list[torch.Tensor]:
        """The K losses, then total and count of each metric, as scalars to be summed over ranks."""
        totals = [sum(part[i].double() for part in parts) for parts in self.pairs.values() for i in (0, 1)]
        return [*sum(self.losses[1:], self.losses[0]).unbind(), *totals]  # type: ignore[list-item]

    def read(self, values: Sequence[float], counts: Sequence[float]) -> tuple[float, dict[str, float]]:
        """The loss and the average of each metric.

        Args:
            values: the numbers of `sums`, summed over ranks.
            counts: [K]; the loss is the sum over k of losses[k] / counts[k].
        """
        losses, rest = values[: len(counts)], values[len(counts) :]
        loss = sum(total / (count or 1.0) for total, count in zip(losses, counts, strict=True))
        return loss, {name: rest[2 * i] / (rest[2 * i + 1] or 1.0) for i, name in enumerate(self.pairs)}
