"""`ptft requeue`: the last command of slurm/train.sbatch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from ptft_dist.errors import RecipeError


def requeue(
    code: Annotated[int, typer.Argument(help="The exit code of srun.")],
    run_file: Annotated[Path, typer.Argument(help="The file that PTFT_RUN_FILE names.")],
    limit: Annotated[int, typer.Option(min=0, help="The most requeues of the job.")] = 100,
) -> None:
    """Requeue the Slurm job of this process if a new start can go on; exit with the code of the job.

    A run that was stopped, or lost a process or a node, goes on. A fault of the recipe, the data or the program does
    not; neither does a job that makes no progress. Each start gets a line in RUN/slurm.jsonl.
    """
    from ptft_dist.slurm.requeue import after_start

    if "SLURM_JOB_ID" not in os.environ:
        raise RecipeError("ptft requeue: this is no Slurm job (SLURM_JOB_ID is not set); slurm/train.sbatch calls it")
    run_dir = run_file.read_text(encoding="utf-8") if run_file.exists() else ""
    decision = after_start(Path(run_dir) if run_dir else None, code, os.environ, limit)
    print(f"ptft: {decision.why}", file=sys.stderr)
    if decision.requeue:
        job = os.environ["SLURM_JOB_ID"]
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"ptft: not requeued: {done.stderr.strip()}; submit the job again to resume", file=sys.stderr)
    raise typer.Exit(decision.code)
