"""result.json: how a start of a run has ended. Ranks write it, or the launcher if no rank could.

status       finished, stopped or failed
exit_code    that of the run
error, host  after a failure: what failed first, and where
lost_hosts   after a failure with exit code 76: the machines to avoid at the next start, if they are known
start        names the start, see `start_token`
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptft_dist.errors import EXIT_LOST
from ptft_dist.launch.environment import START_TOKEN, start_token

RESULT, ENVIRONMENT = "result.json", "environment.json"
VERSION_BEFORE = "PTFT_ENVIRONMENT_BEFORE"
"""The environment variable in which `ptft train --launch` names the `version_of_environment` before the start."""


def write_result(run_dir: Path, values: Mapping[str, Any]) -> None:
    """Replace result.json atomically. Raises OSError."""
    result = {**values, "start": start_token(os.environ)}
    partial = run_dir / f".result-{os.getpid()}.json"
    try:
        partial.write_text(json.dumps(result, indent=1))
        partial.replace(run_dir / RESULT)
    finally:
        partial.unlink(missing_ok=True)


def write_failure(run_dir: Path, values: Mapping[str, Any], lost_hosts: Sequence[str] = ()) -> None:
    """Write result.json for a start that has failed. The first failure is kept: later ones follow from it.

    Only `lost_hosts` are added to it, if it says as well that a process or machine was lost. Raises OSError.

    Args:
        values: without status and lost_hosts.
        lost_hosts: the machines that were lost, as far as this process knows.
    """
    first = read_json(run_dir / RESULT)
    kept = first if first.get("status") == "failed" and may_be_of_this_start(first) else {"status": "failed", **values}
    known = list(kept.get("lost_hosts", ()))
    added = [host for host in lost_hosts if host not in known] if kept["exit_code"] == EXIT_LOST else []
    if added:
        kept["lost_hosts"] = known + added
    if added or kept is not first:
        write_result(run_dir, kept)


def may_be_of_this_start(values: Mapping[str, Any]) -> bool:
    """Not if a file of the run is known to be of another start. Processes of other launchers share no token."""
    shares_token = START_TOKEN in os.environ or "SLURM_JOB_ID" in os.environ
    return not shares_token or values.get("start") == start_token(os.environ)


def has_begun(run_dir: Path) -> bool:
    """Whether this start has begun to train. Before that, result.json is that of an earlier start.

    The starts in an interactive Slurm job have the same token, so environment.json must also be new.
    """
    is_ours = read_json(run_dir / ENVIRONMENT).get("start") == start_token(os.environ)
    return is_ours and version_of_environment(run_dir) != os.environ.get(VERSION_BEFORE)


def version_of_environment(run_dir: Path) -> str:
    """Tells environment.json from that of another start; empty if there is none."""
    try:
        return str((run_dir / ENVIRONMENT).stat().st_mtime_ns)
    except OSError:
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """The contents of a file that a run writes; empty if it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
