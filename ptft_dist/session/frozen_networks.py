"""The frozen networks of a run: teachers, references and reward models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ptft_dist.config.recipe import ModelSection
from ptft_dist.engine import Engine
from ptft_dist.engine.parameters import network_sizes
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import read_facts
from ptft_dist.networks.frozen import FrozenSource
from ptft_dist.reporting.messages import say
from ptft_dist.session.trained_network import TrainedNetwork
from ptft_dist.tasks.protocol import FrozenRole, Task

_OFFLOAD = "train.offload_frozen"


@dataclass(frozen=True)
class FrozenNetworks:
    """What the task reads beside the trained network."""

    roles: Mapping[str, FrozenRole]
    sources: Mapping[str, FrozenSource]
    """By role, as `roles`."""
    offload: bool
    """Keep them in the host's memory."""

    def check(self, kind: str, device: torch.device) -> None:
        """Raises RecipeError if offloading would have no effect. kind, device: of this process's engine."""
        if not self.offload:
            return
        if all(role.shared for role in self.roles.values()):
            raise RecipeError(f"{_OFFLOAD}: this recipe has no frozen network, so it has no effect; remove it")
        if kind in ("zero3", "fsdp2"):
            raise RecipeError(f"{_OFFLOAD}: {kind} shards frozen networks; offload the shards in its launch config")
        if device.type == "cpu":
            raise RecipeError(f"{_OFFLOAD}: it needs a GPU; on a CPU, frozen networks are in the host's memory anyway")

    def place(self, engine: Engine, task: Task, trained: TrainedNetwork, start: ModelSection) -> dict[str, Any]:
        """Load and place them, after the trained network, because its DeepSpeed config has the bucket sizes.

        Args:
            start: what training starts from; a copy of it gets the tokens that were added to the trained network.

        Returns:
            Role -> `network_sizes` of the network.
        """
        sizes = {}
        for role, source in self.sources.items():
            if self.roles[role].shared:
                continue
            with engine.building(pretrained=False):
                model = source.load(self.roles[role].auto_class, engine.dtype)
                if source.path == start.path:
                    trained.add_tokens(model, start)
            task.prepare_frozen(role, model, source)
            facts, size = read_facts(model), network_sizes(model)["model"]
            whole = "in the host's memory, for each process" if self.offload else "on each process"
            where = "sharded over the processes" if engine.kind in ("zero3", "fsdp2") else whole
            count, megabytes = size["parameters"], size["bytes"] / 1e6
            say(f"{role}: {source.path}, {count:,} parameters, frozen, {megabytes:,.1f} MB {where}")
            task.adopt(role, engine.prepare_frozen(model, offload=self.offload), facts)
            sizes[role] = size
        return sizes
