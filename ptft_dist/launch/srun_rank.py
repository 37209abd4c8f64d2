"""`accelerate launch` for a task of srun: this process becomes a rank itself, where torchrun would start processes.

python -m ptft_dist.launch.srun_rank ARGUMENTS
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn


def main() -> None:
    """Let Accelerate read the launch config and set its variables, up to the call of torchrun."""
    from accelerate.commands.launch import main as run
    from torch.distributed import run as torchrun

    torchrun.run = become
    run()


def become(arguments: Any) -> NoReturn:
    """Replace this process by the command that torchrun would start. arguments: those of torchrun, parsed."""
    command = [sys.executable, "-m", arguments.training_script, *arguments.training_script_args]
    words = [word.replace("$$", "$") for word in command]  # escaped for torchrun
    os.execve(sys.executable, words, {**os.environ, **rank_variables(os.environ)})


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun from those of srun, whose tasks are numbered node by node."""
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_NTASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": environ["SLURM_NTASKS_PER_NODE"],
        "GROUP_RANK": environ["SLURM_NODEID"],
    }


if __name__ == "__main__":
    main()
