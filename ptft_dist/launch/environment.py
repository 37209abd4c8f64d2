"""Which rank this process is, from the variables that torchrun and Accelerate set."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    rank: int
    world_size: int
    local_rank: int
    launched: bool  # by torchrun or `accelerate launch`, not as a plain `ptft train`

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def place() -> Place:
    """This process's place; a plain process is rank 0 of 1."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Place(rank, world_size, int(os.environ.get("LOCAL_RANK", "0")), launched="LOCAL_RANK" in os.environ)
