"""What the variables of the launcher say about this process: its rank, and the launch config that started it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptft_dist.config.recipe import Recipe
from ptft_dist.errors import RecipeError
from ptft_dist.launch.deepspeed_config import resolve_deepspeed_config
from ptft_dist.launch.settings import check_settings, settings_of_environment


@dataclass(frozen=True)
class Place:
    """This process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    launched: bool
    """Started by torchrun or `accelerate launch`, not as a plain `ptft train`."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def place() -> Place:
    """This process's place; a plain process is rank 0 of 1."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Place(rank, world_size, int(os.environ.get("LOCAL_RANK", "0")), launched="LOCAL_RANK" in os.environ)


def check_launch(recipe: Recipe) -> None:
    """Check the launch config of this process against the recipe. Raises RecipeError with all problems."""
    _check_launcher(os.environ)
    check_settings(settings_of_environment(os.environ), recipe)


def deepspeed_config_of_launch() -> dict[str, Any] | None:
    """The checked DeepSpeed config of this process's launch config; None without DeepSpeed. Raises RecipeError."""
    settings = settings_of_environment(os.environ)
    return None if settings.deepspeed is None else resolve_deepspeed_config(settings.deepspeed, settings.source)


def describe_backend(backend: str, environ: Mapping[str, str]) -> str:
    """How the network is spread over processes, for the start line.

    backend: single, ddp, fsdp2, zero1, zero2 or zero3. Where DDP follows from the number of processes alone, because
    torchrun or another launcher gave no launch config, the text says so.
    """
    if backend == "ddp" and "ACCELERATE_MIXED_PRECISION" not in environ:  # which `accelerate launch` always sets
        return "ddp (default: started without a launch config; nothing asked for ZeRO or FSDP2)"
    return backend


def _check_launcher(environ: Mapping[str, str]) -> None:
    """Refuse a DeepSpeed run that torchrun did not start.

    DeepSpeed's own launchers set CROSS_SIZE (ssh) or leave RANK to MPI, where each process would train alone.
    """
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    over_ssh = int(environ.get("CROSS_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" not in environ
    if over_ssh or "RANK" not in environ:
        raise RecipeError(
            "this process was started by one of DeepSpeed's own launchers (pdsh over ssh is Accelerate's default), "
            "which is not supported; set deepspeed_multinode_launcher: standard and start one command on each machine. "
            "Delete the file .deepspeed_env that the launcher wrote: it holds your environment, secrets too"
        )


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


EXIT_CODE_FILE = "PTFT_EXIT_CODE_FILE"
"""The environment variable with the file in which ranks leave their exit code for `ptft train --launch`."""


def tell_launcher(exit_code: int) -> None:
    """Give the exit code to `ptft train --launch`: torchrun and `accelerate launch` lose it. Raises OSError.

    The code of the rank that ends first stays: torchrun then ends the other ranks by SIGTERM.
    """
    path = os.environ.get(EXIT_CODE_FILE)
    if path and not Path(path).read_text():
        Path(path).write_text(str(exit_code))
