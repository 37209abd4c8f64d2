"""`ptft requeue`: the last command of slurm/train.sbatch."""

from __future__ import annotations

import os
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
    from ptft_dist.slurm.client import SlurmError, ask, job_facts
    from ptft_dist.slurm.requeue import after_start

    if "SLURM_JOB_ID" not in os.environ:
        raise RecipeError("ptft requeue: this is no Slurm job (SLURM_JOB_ID is not set); slurm/train.sbatch calls it")
    run_dir = run_file.read_text(encoding="utf-8") if run_file.exists() else ""
    job, may = os.environ["SLURM_JOB_ID"], True
    try:
        may = (job_facts(job) or {}).get("Requeue") != "0"
    except SlurmError as error:
        print(f"ptft: {error}", file=sys.stderr)
    decision = after_start(Path(run_dir) if run_dir else None, code, os.environ, limit, may=may)
    print(f"ptft: {decision.why}", file=sys.stderr)
    if decision.requeue:
        try:
            ask("scontrol", "requeue", job)
        except SlurmError as error:
            print(f"ptft: not requeued: {error}. Submit the job again to resume", file=sys.stderr)
    raise typer.Exit(decision.code)
