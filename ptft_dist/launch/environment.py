"""The launcher's environment variables: the rank of this process, and the launch config that started it."""

from __future__ import annotations

import json
import os
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptft_dist.errors import RecipeError
from ptft_dist.launch.deepspeed_config import resolve_deepspeed_config
from ptft_dist.launch.settings import check_settings, settings_of_environment
from ptft_dist.signals import BY_A_LAUNCHER

if TYPE_CHECKING:
    from ptft_dist.config.recipe import Recipe


@dataclass(frozen=True)
class Place:
    """The position of this process among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    launched: bool
    """Started by torchrun or `accelerate launch`, not directly by `ptft train`."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def place() -> Place:
    """The position of this process. Without a launcher it is rank 0 of 1."""
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
    """The backend as text for the start line.

    backend: single, ddp, fsdp2, zero1, zero2 or zero3. The text says if DDP is only the default because no launch
    config was given, for example under torchrun.
    """
    if backend == "ddp" and "ACCELERATE_MIXED_PRECISION" not in environ:  # `accelerate launch` always sets it
        return "ddp (default: started without a launch config, so neither ZeRO nor FSDP2 is used)"
    return backend


def _check_launcher(environ: Mapping[str, str]) -> None:
    """Raises RecipeError for a DeepSpeed run that torchrun did not start.

    DeepSpeed's launchers set CROSS_SIZE (ssh), or do not set RANK (MPI); each process would then train alone.
    """
    if environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    over_ssh = int(environ.get("CROSS_SIZE", "1")) > 1 and "TORCHELASTIC_RUN_ID" not in environ
    if over_ssh or "RANK" not in environ:
        raise RecipeError(
            "this process was started by one of DeepSpeed's own launchers (pdsh over ssh is Accelerate's default), "
            "which is not supported; set deepspeed_multinode_launcher: standard and start one command on each machine. "
            "Delete the file .deepspeed_env that the launcher wrote: it contains your environment variables, including "
            "secrets"
        )


def job_id() -> str | None:
    """The id of the Slurm or torchrun job, which can restart this process; None outside of a job."""
    if "SLURM_JOB_ID" in os.environ:
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        return f"slurm-{os.environ.get('SLURM_ARRAY_JOB_ID', os.environ['SLURM_JOB_ID'])}" + (
            f"_{task}" if task else ""
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun-{os.environ['TORCHELASTIC_RUN_ID']}-{os.getppid()}"
    return None


def restarted_job() -> str | None:
    """The id of the job if Slurm has requeued it or torchrun has restarted it; None at its first start."""
    restarts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return job_id() if any(count not in ("", "0") for count in restarts) else None


def may_be_requeued() -> bool:
    """Whether this is a Slurm job, which its script may requeue after exit code 75."""
    return "SLURM_JOB_ID" in os.environ


COMMAND = "PTFT_COMMAND"
"""The environment variable in which `ptft train --launch` names its own command line to the ranks, as JSON."""


def user_command(environ: Mapping[str, str]) -> list[str]:
    """The command line that a user has started: that of `ptft train --launch`, or of this process."""
    return list(json.loads(environ[COMMAND])) if COMMAND in environ else sys.argv


START_TOKEN = "PTFT_START_TOKEN"
"""The environment variable that names this start of the run: what its launchers write into a stop file."""


def start_token(environ: Mapping[str, str], address: str | None = None) -> str:
    """A text that all processes of this start share, and no other start has.

    Outside of Slurm, launchers on several machines share nothing but the `address` of machine 0, which other starts may
    have too.
    """
    if given := environ.get(START_TOKEN):
        return given
    if "SLURM_JOB_ID" in environ:
        own = f"Slurm job {environ['SLURM_JOB_ID']}, restart {environ.get('SLURM_RESTART_COUNT') or 0}"
    else:
        own = address or uuid.uuid4().hex
    return f"{BY_A_LAUNCHER} {own}"


def end_of_job(environ: Mapping[str, str]) -> float | None:
    """When the job reaches its time limit, in seconds since 1970, as its batch script says; None if there is none."""
    text = environ.get("PTFT_END_TIME", "")
    return float(text) if text.isdigit() else None


RUN_FILE = "PTFT_RUN_FILE"
"""The environment variable with the path of a file, on the first node, in which `ptft train` writes its run_dir."""


def tell_run_dir(run_dir: Path) -> None:
    """Pass the run directory to the script of a Slurm job.

    The commands that this process starts pass nothing on: folds and trials would replace it by their own.
    """
    path = Path(os.environ.pop(RUN_FILE, ""))
    if path.is_file():
        path.write_text(str(run_dir.absolute()), encoding="utf-8")


EXIT_CODE_FILE = "PTFT_EXIT_CODE_FILE"
"""The environment variable with the path of the file in which ranks write their exit code for `ptft train --launch`."""


RUN_DIR = "PTFT_RUN_DIR"
"""The environment variable in which `ptft train --launch` names the run directory to `accelerate launch`; other
commands have none."""


def tell_launcher(exit_code: int) -> None:
    """Pass the exit code to `ptft train --launch`, because torchrun and `accelerate launch` do not. Raises OSError.

    The code of the rank that ends first is kept, because torchrun then ends the other ranks with SIGTERM.
    """
    path = os.environ.get(EXIT_CODE_FILE)
    if path and not Path(path).read_text():
        Path(path).write_text(str(exit_code))
