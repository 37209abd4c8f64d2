"""What the launcher's variables say: which rank this process is, and what they must not decide."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ptft_dist.config.recipe import Recipe
from ptft_dist.errors import RecipeError


@dataclass(frozen=True)
class Place:
    rank: int
    world_size: int
    local_rank: int
    launched: bool  # by torchrun or `accelerate launch`, not as a plain `ptft train`

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def check_launch(recipe: Recipe) -> None:
    """Refuse a launch config that decides what the recipe decides. Raises RecipeError."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", recipe.train.precision):
        raise RecipeError(
            f"the launch config sets mixed_precision: {precision}, the recipe train.precision: "
            f"{recipe.train.precision}; set 'no' in the launch config"
        )
    if os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        raise RecipeError("the launch config sets gradient_accumulation_steps; it follows from the recipe's batch")
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise RecipeError("the launch config sets a dynamo backend; use model.compile: true in the recipe")


def place() -> Place:
    """This process's place; a plain process is rank 0 of 1."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Place(rank, world_size, int(os.environ.get("LOCAL_RANK", "0")), launched="LOCAL_RANK" in os.environ)


def job_id() -> str | None:
    """Identifies the job of a scheduler or launcher that starts this process again by itself; None outside of one."""
    if "SLURM_JOB_ID" in os.environ:
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        return f"slurm-{os.environ.get('SLURM_ARRAY_JOB_ID', os.environ['SLURM_JOB_ID'])}" + (
            f"_{task}" if task else ""
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun-{os.environ['TORCHELASTIC_RUN_ID']}-{os.getppid()}"
    return None


def restarted_job() -> str | None:
    """The job's id if this is not its first start: requeued by Slurm, or restarted by torchrun; else None."""
    restarts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return job_id() if any(count not in ("", "0") for count in restarts) else None


def is_requeued() -> bool:
    """Whether a scheduler starts this job again after exit code 75."""
    return "SLURM_JOB_ID" in os.environ
