"""What happens to a Slurm job after a start of it has ended: is it requeued, and why?

    RUN/slurm.jsonl    one line for each start: job, restart, nodes, exit code, cause, update, whether it was requeued

This module imports no torch, since it runs between two starts.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptft_dist.errors import EXIT_DISK, EXIT_FAILED, EXIT_FINISHED, EXIT_LOST, EXIT_MEMORY, EXIT_STOPPED
from ptft_dist.launch.environment import start_token
from ptft_dist.launch.result import RESULT, read_json
from ptft_dist.slurm.client import fields

HISTORY = "slurm.jsonl"
CAUSES = {
    EXIT_FINISHED: "finished",
    EXIT_FAILED: "failed: an error in the program",
    2: "failed: the recipe, the launch config or the command is wrong",
    3: "failed: the data are wrong",
    4: "failed: a checkpoint is missing, damaged or of another recipe",
    5: "failed: the loss is not finite",
    EXIT_STOPPED: "stopped, to be resumed",
    EXIT_LOST: "a process or a node was lost",
    EXIT_MEMORY: "failed: out of memory",
    EXIT_DISK: "the disk is full or the quota is used up",
}
"""Exit code of a start -> its cause."""
BY_SLURM = "ended and requeued by Slurm itself: a node was down, or a checkpoint took too long"
"""The cause of a start whose script could not go on to `ptft requeue`."""
WITHOUT_PROGRESS = 3
"""After so many starts in a row without a new checkpoint, the job ends."""


class Decision(NamedTuple):
    """What follows after a start."""

    code: int
    """The exit code of the job."""
    requeue: bool
    why: str


def decide(
    srun: int, result: Mapping[str, Any] | None, updates: Sequence[int], limit: int, *, may: bool = True
) -> Decision:
    """Decide from how a start has ended.

    Faults of the recipe, the data or the program would only come again, so they are never requeued.

    Args:
        srun: the exit code of srun: the highest one of its tasks, or that of the signal with which it ended the last.
        result: result.json, if this start has written it.
        updates: the update of the newest checkpoint after each start of the job, this one included.
        limit: the most requeues of the job.
        may: whether Slurm requeues the job when asked; not after `ptft cancel`, or with --no-requeue.
    """
    code = srun if result is None else int(result["exit_code"])
    if code not in CAUSES:  # a signal, such as that of srun to the tasks of other nodes
        code = EXIT_LOST
    why = CAUSES[code]
    if code not in (EXIT_STOPPED, EXIT_LOST, EXIT_DISK):
        return Decision(code, False, why)
    if not may:
        return Decision(code, False, f"{why}; not requeued, because the job was cancelled or is not to be requeued")
    if len(updates) > limit:
        return Decision(code, False, f"{why}; not requeued, because the job has been requeued {limit} times")
    before, last = [0, *updates[:-WITHOUT_PROGRESS]][-1], updates[-WITHOUT_PROGRESS:]
    if len(last) == WITHOUT_PROGRESS and set(last) == {before}:
        stuck = f"{WITHOUT_PROGRESS} starts have ended without a new checkpoint (update {before})"
        return Decision(code, False, f"{why}; not requeued, because {stuck}")
    return Decision(code, True, why)


def after_start(
    run_dir: Path | None, srun: int, environ: Mapping[str, str], limit: int, *, may: bool = True
) -> Decision:
    """Decide, and add a line to the history of the run.

    Args:
        run_dir: None if the start has not read its recipe.
        environ: of the job.
        may: see `decide`.
    """
    restart = int(environ.get("SLURM_RESTART_COUNT") or 0)
    if run_dir is None or not run_dir.is_dir():
        return decide(srun, None, [0] * (restart + 1), limit, may=may)
    job, update = environ["SLURM_JOB_ID"], newest_update(run_dir)
    earlier = [row for row in history(run_dir) if row["job"] == job]
    for unknown in range(len(earlier), restart):
        known = earlier[-1]["update"] if earlier else 0
        row = {"job": job, "restart": unknown, "time": "", "nodes": "", "exit_code": EXIT_LOST, "cause": BY_SLURM}
        earlier.append({**row, "update": known, "requeued": True})
        _add(run_dir, earlier[-1])
    updates = [row["update"] for row in earlier]
    decision = decide(srun, _result(run_dir, environ), [*updates, update], limit, may=may)
    row = {
        "job": job,
        "restart": restart,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "nodes": environ.get("SLURM_JOB_NODELIST", ""),
        "exit_code": decision.code,
        "cause": decision.why,
        "update": update,
        "requeued": decision.requeue,
    }
    _add(run_dir, row)
    return decision


def commands(decision: Decision, job_id: str, lost: Sequence[str], facts: str) -> list[str]:
    """The commands for scontrol that follow from a decision. A node is excluded only while enough others are left.

    Args:
        lost: names of the machines that have failed.
        facts: what `scontrol --oneliner show` says of the job, and of all nodes; empty if Slurm does not answer.
    """
    lines = [fields(line) for line in facts.splitlines()]
    job: dict[str, str] = next((line for line in lines if "JobId" in line), {})
    if not decision.requeue:
        return []
    if not job or not lost:
        return [f"requeue {job_id}"]
    own = set(job["Partition"].split(","))
    nodes = [line for line in lines if "NodeName" in line and own & set(line.get("Partitions", "").split(","))]
    known = job.get("ExcNodeList", "(null)")
    before = set() if known == "(null)" else {node["NodeName"] for node in nodes if _is_in(node["NodeName"], known)}
    names = {*lost, *(host.partition(".")[0] for host in lost)}  # with and without its domain
    bad = {node["NodeName"] for node in nodes if {node["NodeName"], node.get("NodeHostName")} & names}
    left = [node for node in nodes if node["NodeName"] not in before | bad and not _DOWN.search(node["State"])]
    found = [f"requeue {job_id}"]
    if bad - before and len(left) >= int(job["NumNodes"].split("-")[0]):
        found.append(f"update JobId={job_id} ExcNodeList={','.join(sorted(before | bad))}")
    return found


_DOWN = re.compile(r"DOWN|DRAIN|FAIL|NOT_RESPONDING|\*")


def _is_in(name: str, node_list: str) -> bool:
    """Whether a list such as a,n[0-3,7] has this node."""
    for prefix, ranges, plain in re.findall(r"([^,\[]+)\[([^\]]+)\]|([^,\[]+)", node_list):
        if name == plain:
            return True
        number = name.removeprefix(prefix) if prefix and name.startswith(prefix) else ""
        for each in ranges.split(",") if number.isdigit() else ():
            first, _, last = each.partition("-")
            padded = f"{int(number):0{len(first)}}"  # n[8-10] are n8, n9, n10; n[08-10] are n08, n09, n10
            if number == padded and int(first) <= int(number) <= int(last or first):
                return True
    return False


def _add(run_dir: Path, row: Mapping[str, Any]) -> None:
    """Add a line. If the disk is full, the decision matters more than its record."""
    try:
        with (run_dir / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        print(f"ptft: {run_dir / HISTORY} cannot be written: {error.strerror}", file=sys.stderr)


def history(run_dir: Path) -> list[dict[str, Any]]:
    """The starts of the run in Slurm jobs, in their order."""
    file, rows = run_dir / HISTORY, []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):  # a line that a full disk has cut off
            rows.append(json.loads(line))
    return rows


def newest_update(run_dir: Path) -> int:
    """The update of the newest complete checkpoint, 0 without one; of a sweep or folds, the sum over their runs."""
    if runs := [*run_dir.glob("trial-*"), *run_dir.glob("fold-*")]:
        return sum(map(newest_update, runs))
    steps = (path.parent.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*/manifest.json"))
    return max((int(step) for step in steps if step.isdecimal()), default=0)  # not copies, such as step-00000100.bak


def lost_hosts(run_dir: Path | None, environ: Mapping[str, str]) -> list[str]:
    """The machines that this start has lost, as far as it has noticed."""
    result = None if run_dir is None else _result(run_dir, environ)
    return [] if result is None else list(result.get("lost_hosts", []))


def _result(run_dir: Path, environ: Mapping[str, str]) -> dict[str, Any] | None:
    """result.json, unless it is damaged, or an earlier start has written it. Of folds, that of the one that has ended
    the start; the results of trials do not end a sweep."""
    own, *folds = (read_json(folder / RESULT) for folder in (run_dir, *run_dir.glob("fold-*")))
    results = [own, *(fold for fold in folds if fold.get("exit_code") != EXIT_FINISHED)]
    return next((result for result in results if result.get("start") == start_token(environ)), None)
