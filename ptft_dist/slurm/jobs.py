"""The Slurm job of a run: submitted, asked about, read, cancelled.

RUN/slurm/job.sbatch   its script
RUN/slurm/job.json     its id, written when it was submitted
RUN/slurm/ID.log       what it says, over all its starts
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from ptft_dist.errors import RecipeError
from ptft_dist.launch.result import read_json
from ptft_dist.slurm.client import ENDED, SlurmError, ask, job_facts, sbatch
from ptft_dist.slurm.requeue import history, newest_update

if TYPE_CHECKING:
    from ptft_dist.slurm.render import Job

FOLDER, _JOB = "slurm", "job.json"
_CANCELLED = "cancelled"
"""The file with the id of the job that `ptft cancel` has ended."""
_LOOK_EVERY_S = 0.5
_RECENT = 200
"""So many rows of metrics.jsonl tell how long an update takes."""


def submit(job: Job, script: str, run_dirs: Sequence[Path]) -> str:
    """Write the script, and submit it; the job's id. Raises SlurmError, RecipeError.

    run_dirs: those of the job, or of the tasks of its array. Each remembers its job; none if the job does not train.
    """
    try:
        job.log.mkdir(parents=True, exist_ok=True)
        job.script.write_text(script, encoding="utf-8")
        for run_dir in run_dirs:
            (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(error) from None
    array = len(job.commands) > 1
    number = sbatch(job.script, job.log, array=array)
    try:
        for run_dir in with_jobs(job.log.parent) if run_dirs else ():  # of earlier submissions in another form
            (run_dir / FOLDER / _JOB).unlink(missing_ok=True)
        for task, run_dir in enumerate(run_dirs):
            own = f"{number}_{task}" if array else number
            (run_dir / FOLDER / _JOB).write_text(json.dumps({"job": own, "log": str(job.log / f"{own}.log")}))
    except OSError as error:
        ask("scancel", number)
        raise _not_written(error) from None
    return number


def _not_written(error: OSError) -> RecipeError:
    return RecipeError(f"run_dir: {error.filename} cannot be written: {error.strerror}. Choose another run_dir")


def job_of(run_dir: Path) -> str | None:
    """The id of the run's last job; None if there is none."""
    if (known := _known(run_dir)) is not None:
        return known["job"]
    rows = history(run_dir)  # of jobs with slurm/train.sbatch
    return rows[-1]["job"] if rows else None


def _known(run_dir: Path) -> dict[str, str] | None:
    return read_json(run_dir / FOLDER / _JOB) or None  # a full disk may have cut it off


def find_run(text: str) -> Path:
    """The run directory that a user names, directly or by the id of its job. Raises RecipeError, SlurmError."""
    path = Path(text)
    if path.is_dir() or not text.replace("_", "").isdigit():
        return path
    facts = job_facts(text)
    command = Path("" if facts is None else facts.get("Command", ""))
    if command.parent.name != FOLDER:
        raise RecipeError(f"{text}: neither a directory, nor a job of ptft submit that Slurm remembers")
    found = next((each for each in with_jobs(command.parent.parent) if job_of(each) == text), None)
    if found is None:
        raise RecipeError(f"{text}: not the job that trains in {command.parent.parent}; give the run directory")
    return found


def with_jobs(run_dir: Path) -> list[Path]:
    """The directories that may remember a job of this run: its own, and those of the tasks of an array, which are folds
    or workers of a sweep."""
    files = (file for kind in ("fold", "worker") for file in run_dir.glob(f"{kind}-*/{FOLDER}/{_JOB}"))
    return [run_dir, *sorted((file.parent.parent for file in files), key=lambda part: (len(part.name), part.name))]


def waiting_and_running() -> list[tuple[str, str, str, str]]:
    """This user's jobs that ptft has submitted: id, state, time, run directory. Raises SlurmError."""
    found = []
    for line in ask("squeue", "--me", "--noheader", "--array", "--format=%i|%T|%M of %l|%o").splitlines():
        number, state, clock, command = line.split("|", 3)
        if Path(command).parent.name == FOLDER and Path(command).name != "train.sbatch":
            run_dir = next((each for each in with_jobs(Path(command).parent.parent) if job_of(each) == number), None)
            found.append((number, state.lower(), clock, str(run_dir or Path(command).parent.parent)))
    return found


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
    if (names := _parts(run_dir)) is not None:
        return [(name, _part_state(run_dir / name, output)) for name, output in names.items()]
    job = require_job(run_dir)
    facts = _facts(job)
    lines = [("job", job), ("state", "ended; Slurm has forgotten it" if facts is None else _state(job, facts, run_dir))]
    if facts is not None and facts.get("NodeList", "(null)") != "(null)":
        lines.append(("nodes", facts["NodeList"]))
    if facts is not None and "TimeLimit" in facts:
        lines.append(("time", f"{facts.get('RunTime', '?')} of {facts['TimeLimit']}"))
    ended = facts is not None and facts["JobState"] in ENDED
    lines += [("update", text) for text in _progress(run_dir, ended=ended)]
    update = newest_update(run_dir)
    lines.append(("checkpoint", f"update {update}" if update else "none"))
    for number, start in enumerate(history(run_dir), 1):
        again = ", requeued" if start["requeued"] else ""
        where = (start["time"], f"job {start['job']}", start["nodes"])
        lines.append((f"start {number}", f"{' '.join(filter(None, where))}: {start['cause']}{again}"))
    return lines


def cancel(run_dir: Path) -> str:
    """End the run's job, which saves a checkpoint first if it trains; what was done. Raises RecipeError, SlurmError.

    Of a pipeline or an array: all its jobs, the last ones first, because they wait for the others.
    """
    if (names := _parts(run_dir)) is not None:
        known = [name for name in reversed(names) if job_of(run_dir / name) is not None]
        if not known:
            raise RecipeError(f"{run_dir}: no stage has a Slurm job. ptft pipeline FILE --submit makes them")
        return "\n".join(f"{name}: {cancel(run_dir / name)}" for name in known)
    job = require_job(run_dir)
    facts = job_facts(job)
    if facts is None or facts["JobState"] in ENDED:
        return f"job {job} has already ended"
    (run_dir / FOLDER / _CANCELLED).write_text(job)
    if facts["JobState"] != "RUNNING":
        ask("scancel", job)
        return f"job {job} was {facts['JobState'].lower()}, and is cancelled"
    ask("scontrol", "update", f"JobId={job}", "Requeue=0")  # otherwise it would requeue itself
    ask("scancel", "--signal=TERM", job)
    return f"job {job} saves a checkpoint and ends"


def log_lines(run_dir: Path, *, follow: bool, task: int | None = None) -> Iterator[str]:
    """The text of the job's log in pieces; with `follow` until the job has ended. Raises RecipeError, SlurmError.

    task: only the lines of this task of srun: with `accelerate launch` one for each node, otherwise one for each rank.
    """
    job, known = require_job(run_dir), _known(run_dir)
    path = run_dir / FOLDER / f"{job}.log" if known is None else Path(known["log"])
    label = None if task is None else re.compile(rf" *{task}: ")
    if not path.exists() and not follow:
        raise RecipeError(f"{path}: there is no log. The job has not started, or it was not started by ptft submit")
    place, rest, shown = 0, "", False
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")  # a piece may end within a character
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    while True:
        ended = not follow or (facts := job_facts(job)) is None or facts["JobState"] in ENDED
        if path.exists():
            with path.open("rb") as file:
                file.seek(place)
                read = file.read()
            place += len(read)
            text = decoder.decode(read, final=ended)
            if label is not None:
                *whole, rest = (rest + text).split("\n")
                text = "".join(f"{line}\n" for line in whole if label.match(line))
                shown = shown or bool(text)
            yield text
        if ended and label is not None and not shown:
            raise RecipeError(f"--task: {path} has no lines of task {task}; a job with one task has no numbers")
        if ended:
            return
        time.sleep(_LOOK_EVERY_S)


def _parts(out: Path) -> dict[str, Path | None] | None:
    """The stages of a pipeline, with their outputs, or the tasks of an array: folds, or workers of a sweep."""
    if stages := read_json(out / "pipeline.json").get("stages"):
        return {name: out / name / output for name, output in stages.items()}
    _, *tasks = with_jobs(out)
    return dict.fromkeys(task.name for task in tasks) if tasks and not (out / FOLDER / _JOB).exists() else None


def _part_state(folder: Path, output: Path | None) -> str:
    """The job of a stage or a fold and its state, what its last start has ended with, and its update."""
    job, ended = job_of(folder), history(folder)
    facts = None if job is None else _facts(job)
    words = [] if job is None or facts is None else [f"job {job} {_state(job, facts, folder)}"]
    words += ["done"] if output is not None and output.exists() else []
    words += [f"last start: {ended[-1]['cause']}"] if ended else []
    words += [f"update {text}" for text in _progress(folder)]
    return ", ".join(words) or ("no job" if job is None else f"job {job} has ended; Slurm has forgotten it")


def _facts(job: str) -> Mapping[str, str] | None:
    try:
        return job_facts(job)
    except SlurmError as error:
        return {"JobId": job, "JobState": "UNKNOWN", "Reason": str(error).splitlines()[0]}


def _state(job: str, facts: Mapping[str, str], run_dir: Path) -> str:
    """The state of a job; `cancelled` if `ptft cancel` has ended it, which Slurm knows as a failure.

    job: its id, of a task of an array ARRAY_TASK, for which the JobId of the facts is another one.
    """
    state, reason = facts["JobState"].lower(), facts.get("Reason", "None")
    file = run_dir / FOLDER / _CANCELLED
    if state in ("failed", "cancelled") and file.exists() and file.read_text() == job:
        return "cancelled by ptft cancel"
    return state if reason == "None" else f"{state} ({reason})"


def _progress(run_dir: Path, *, ended: bool = False) -> list[str]:
    """The last update in metrics.jsonl, whose last line may be incomplete, and the time that the others will take
    unless the job has `ended`."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    rows = [row for line in lines[-_RECENT:] if "loss" in (row := json.loads(line))]
    if not rows:
        return []
    last, total = rows[-1], None
    with contextlib.suppress(OSError, ValueError):
        total = json.loads((run_dir / "environment.json").read_text(encoding="utf-8")).get("updates")
    text = f"{last['step']}" + (f" of {total}" if total else "")
    text += f", loss {last['loss']:.4f}, {last.get('tokens_per_s', 0):,.0f} tokens/s"
    if total and last["step"] < total and not ended:
        left = (total - last["step"]) * statistics.median(row["time_s"] for row in rows)
        text += f", {timedelta(seconds=round(left))} left without evaluations and saves"
    return [text]
