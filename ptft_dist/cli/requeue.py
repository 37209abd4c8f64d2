"""`ptft requeue`: the last command of a batch script."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ptft_dist.errors import RecipeError


def requeue(
    job: Annotated[str, typer.Argument(help="The id of the job; of a task of an array: ARRAY_TASK.")],
    code: Annotated[int, typer.Argument(help="The exit code of srun.")],
    run_file: Annotated[Path, typer.Argument(help="The file that PTFT_RUN_FILE names.")],
    limit: Annotated[int, typer.Option(min=0, help="The most requeues of the job.")] = 100,
) -> None:
    """Decide whether the Slurm job of this process is requeued; exit with the code of the job. Batch scripts call it.

    A run that was stopped, or lost a process or a node, goes on. A fault of the recipe, the data or the program does
    not; neither does a job that makes no progress. Each start gets a line in RUN/slurm.jsonl.

    Reads what `scontrol --oneliner show` says of the job and of all nodes. Prints arguments of scontrol, a command per
    line: to requeue the job, and to exclude a node that has failed.
    """
    from ptft_dist.slurm.client import fields
    from ptft_dist.slurm.requeue import after_start, commands, lost_hosts

    if "SLURM_JOB_ID" not in os.environ:
        raise RecipeError("ptft requeue: this is no Slurm job (SLURM_JOB_ID is not set); slurm/train.sbatch calls it")
    facts = "" if sys.stdin.isatty() else sys.stdin.read()
    text = run_file.read_text(encoding="utf-8") if run_file.exists() else ""
    run_dir = Path(text) if text else None
    may = fields(facts.partition("\n")[0]).get("Requeue") != "0"
    decision = after_start(run_dir, code, os.environ, limit, may=may)
    print(f"ptft: {decision.why}", file=sys.stderr)
    for line in commands(decision, job, lost_hosts(run_dir, os.environ), facts):
        print(line)
    raise typer.Exit(decision.code)
