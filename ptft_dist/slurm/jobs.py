"""The Slurm job of a run: submitted, asked about, read, cancelled.

RUN/slurm/job.sbatch   its script
RUN/slurm/job.json     its id, written when it was submitted
RUN/slurm/ID.log       what it says, over all its starts
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ptft_dist.errors import RecipeError
from ptft_dist.slurm.client import ENDED, SlurmError, ask, job_facts, sbatch
from ptft_dist.slurm.requeue import history, newest_update

FOLDER, _JOB = "slurm", "job.json"
_LOOK_EVERY_S = 0.5


def submit(script: str, run_dir: Path) -> str:
    """Write the script to the run directory, and submit it; the job's id. Raises SlurmError, RecipeError."""
    folder = run_dir / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "job.sbatch").write_text(script, encoding="utf-8")
        job = sbatch(folder / "job.sbatch", folder)
        (folder / _JOB).write_text(json.dumps({"job": job}))
    except OSError as error:
        raise RecipeError(f"run_dir: {folder} cannot be written: {error.strerror}. Choose another run_dir") from None
    return job


def job_of(run_dir: Path) -> str | None:
    """The id of the run's last job; None if there is none."""
    file = run_dir / FOLDER / _JOB
    if file.exists():
        return str(json.loads(file.read_text())["job"])
    rows = history(run_dir)  # of jobs with slurm/train.sbatch
    return rows[-1]["job"] if rows else None


def require_job(run_dir: Path) -> str:
    """As `job_of`. Raises RecipeError if there is none."""
    job = job_of(run_dir)
    if job is None:
        raise RecipeError(
            f"{run_dir}: no Slurm job has trained here. Give the run_dir of a run that ptft submit started"
        )
    return job


def status(run_dir: Path) -> list[tuple[str, str]]:
    """What is known of a run: name and text of each fact. Raises RecipeError, SlurmError."""
    job = require_job(run_dir)
    try:
        facts = job_facts(job)
    except SlurmError as error:
        facts = {"JobState": f"unknown: {error}"}
    lines = [("job", job), ("state", "ended; Slurm has forgotten it" if facts is None else _state(facts))]
    if facts is not None and facts.get("NodeList", "(null)") != "(null)":
        lines.append(("nodes", facts["NodeList"]))
    if facts is not None and "TimeLimit" in facts:
        lines.append(("time", f"{facts.get('RunTime', '?')} of {facts['TimeLimit']}"))
    if (row := _last_row(run_dir)) is not None:
        lines.append(("update", f"{row['step']}, loss {row['loss']:.4f}, {row.get('tokens_per_s', 0):,.0f} tokens/s"))
    lines.append(("checkpoint", f"update {newest_update(run_dir)}"))
    for number, start in enumerate(history(run_dir), 1):
        again = ", requeued" if start["requeued"] else ""
        lines.append(
            (f"start {number}", f"{start['time']} job {start['job']} {start['nodes']}: {start['cause']}{again}")
        )
    return lines


def cancel(run_dir: Path) -> str:
    """End the run's job, which saves a checkpoint first if it trains; what was done. Raises RecipeError, SlurmError."""
    job = require_job(run_dir)
    facts = job_facts(job)
    if facts is None or facts["JobState"] in ENDED:
        return f"job {job} has already ended"
    if facts["JobState"] != "RUNNING":
        ask("scancel", job)
        return f"job {job} was {facts['JobState'].lower()}, and is cancelled"
    ask("scontrol", "update", f"JobId={job}", "Requeue=0")  # otherwise it would requeue itself
    ask("scancel", "--signal=TERM", job)
    return f"job {job} saves a checkpoint and ends"


def log_lines(run_dir: Path, *, follow: bool) -> Iterator[str]:
    """The text of the job's log in pieces; with `follow` until the job has ended. Raises RecipeError, SlurmError."""
    job = require_job(run_dir)
    path = run_dir / FOLDER / f"{job}.log"
    if not path.exists() and not follow:
        raise RecipeError(f"{path}: there is no log. The job has not started, or it was not started by ptft submit")
    place = 0
    while True:
        ended = not follow or (facts := job_facts(job)) is None or facts["JobState"] in ENDED
        if path.exists():
            with path.open(encoding="utf-8", errors="replace") as file:
                file.seek(place)
                yield file.read()
                place = file.tell()
        if ended:
            return
        time.sleep(_LOOK_EVERY_S)


def _state(facts: Mapping[str, str]) -> str:
    state, reason = facts["JobState"].lower(), facts.get("Reason", "None")
    return state if reason == "None" else f"{state} ({reason})"


def _last_row(run_dir: Path) -> dict[str, Any] | None:
    """The last update in metrics.jsonl, whose last line may be incomplete."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return next((row for line in reversed(lines) if "loss" in (row := json.loads(line))), None)
