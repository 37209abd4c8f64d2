"""Which ends of a Slurm job's start are followed by a requeue."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ptft_dist.errors import NonFiniteLossError, RecipeError, exit_code_of
from ptft_dist.launch.environment import start_token
from ptft_dist.slurm.requeue import Decision, after_start, commands, decide, history, lost_hosts

STOPPED, LOST = {"exit_code": 75}, {"exit_code": 76}


@pytest.mark.parametrize(
    ("srun", "result", "code", "requeued"),
    [
        (0, {"exit_code": 0}, 0, False),
        (75, STOPPED, 75, True),
        (137, STOPPED, 75, True),  # srun has killed the tasks of another node
        (76, LOST, 76, True),
        (77, {"exit_code": 77}, 77, False),
        (137, {"exit_code": 77}, 77, False),
        (77, None, 77, False),
        (78, {"exit_code": 78}, 78, True),
        (78, None, 78, True),
        (137, None, 76, True),  # the machine is gone, or out of memory, and nobody could report it
        (143, None, 76, True),
        (1, {"exit_code": 1}, 1, False),
        (137, {"exit_code": 1}, 1, False),
        (1, None, 1, False),
        (2, None, 2, False),
        (3, None, 3, False),
        (4, None, 4, False),
        (137, {"exit_code": 5}, 5, False),
    ],
)
def test_how_a_start_ends(srun: int, result: dict[str, Any] | None, code: int, requeued: bool) -> None:
    decision = decide(srun, result, [5], limit=100)
    assert (decision.code, decision.requeue) == (code, requeued)


def test_a_job_without_progress_ends() -> None:
    assert decide(76, LOST, [5, 5], 100).requeue
    assert decide(76, LOST, [4, 5, 5], 100).requeue
    assert decide(76, LOST, [5, 5, 5], 100).requeue  # the first of them has written it
    assert not decide(76, LOST, [0, 0, 0], 100).requeue
    assert decide(76, LOST, [4, 5, 5, 5], 100).requeue
    stuck = decide(76, LOST, [4, 5, 5, 5, 5], 100)
    assert not stuck.requeue
    assert "3 starts have ended without a new checkpoint (update 5)" in stuck.why
    assert decide(75, STOPPED, [4, 5, 6], 3).requeue
    assert not decide(75, STOPPED, [4, 5, 6, 7], 3).requeue


def test_a_full_disk_has_the_budget_of_starts_without_progress() -> None:
    assert decide(78, {"exit_code": 78}, [5, 5], 100).requeue
    stuck = decide(78, {"exit_code": 78}, [5, 5, 5, 5], 100)
    assert not stuck.requeue
    assert stuck.why.startswith("the disk is full or the quota is used up; not requeued, because 3 starts")


def test_a_job_that_slurm_will_not_requeue() -> None:
    """After `ptft cancel`, or with --no-requeue; the history must not say that it was requeued."""
    decision = decide(75, STOPPED, [5], 100, may=False)
    assert (decision.code, decision.requeue) == (75, False)
    assert "the job was cancelled" in decision.why


def test_a_history_that_cannot_be_written_does_not_prevent_the_requeue(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slurm.jsonl").write_text('{"job": "7", "upd')
    assert history(tmp_path) == []
    (tmp_path / "slurm.jsonl").unlink()
    (tmp_path / "slurm.jsonl").symlink_to(tmp_path / "absent/slurm.jsonl")
    assert after_start(tmp_path, 75, {"SLURM_JOB_ID": "7"}, 100).requeue
    assert "slurm.jsonl cannot be written: No such file or directory" in capsys.readouterr().err


def test_the_history_of_a_run(tmp_path: Path) -> None:
    """Starts of other jobs do not count, nor does the result of an earlier start."""
    (tmp_path / "slurm.jsonl").write_text("".join(json.dumps({"job": "6", "update": 0}) + "\n" for _ in range(5)))
    for restart, update in enumerate((3, 3, 3, 3)):
        environ = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart), "SLURM_JOB_NODELIST": "n[0-1]"}
        folder = tmp_path / f"checkpoints/step-{update:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").touch()
        shutil.copytree(folder, tmp_path / "checkpoints/step-00000008.bak", dirs_exist_ok=True)  # of a user
        (tmp_path / "checkpoints/step-00000009").mkdir(exist_ok=True)  # without a manifest it is no checkpoint
        decision = after_start(tmp_path, 137, environ, 100)
        assert decision.requeue == (restart < 3)
        (tmp_path / "result.json").write_text(json.dumps({"exit_code": 0, "start": start_token(environ)}))
    assert after_start(tmp_path, 137, environ, 100).code == 0
    rows = history(tmp_path)[5:]
    assert [(row["restart"], row["update"], row["exit_code"]) for row in rows] == [
        (0, 3, 76), (1, 3, 76), (2, 3, 76), (3, 3, 76), (3, 3, 0),
    ]  # fmt: skip
    assert rows[0]["nodes"] == "n[0-1]"
    assert [row["requeued"] for row in rows] == [True, True, True, False, False]


def test_starts_that_slurm_has_ended_itself_are_in_the_history(tmp_path: Path) -> None:
    assert after_start(tmp_path, 75, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}, 100).requeue
    first, second = history(tmp_path)
    assert (first["restart"], first["cause"][:14], first["requeued"]) == (0, "ended and requ", True)
    assert (second["restart"], second["exit_code"]) == (1, 75)


def test_folds_and_trials_make_progress_together(tmp_path: Path) -> None:
    """A start may finish one fold and begin the next, whose updates count from 0 again."""

    def ended(restart: int, fold: int, update: int, code: int) -> Decision:
        environ = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart)}
        folder = tmp_path / f"fold-{fold}/checkpoints/step-{update:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").touch()
        result = {"exit_code": code, "lost_hosts": [f"n{fold}"], "start": start_token(environ)}
        (tmp_path / f"fold-{fold}/result.json").write_text(json.dumps(result))
        return after_start(tmp_path, 137, environ, 100)

    assert ended(0, 0, 9, code=75).requeue
    assert ended(1, 1, 5, code=75).requeue
    assert ended(2, 2, 1, code=76).requeue
    assert [row["update"] for row in history(tmp_path)] == [9, 14, 15]
    assert lost_hosts(tmp_path, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}) == ["n2"]
    assert ended(3, 2, 1, code=1) == Decision(1, False, "failed: an error in the program")
    assert ended(4, 2, 1, code=0).code == 76  # not all folds have finished, only this one


def test_a_start_that_has_not_read_its_recipe() -> None:
    job = {"SLURM_JOB_ID": "7"}
    assert not after_start(None, 2, job, 100).requeue
    assert after_start(None, 75, job, 100).requeue
    assert not after_start(None, 75, {**job, "SLURM_RESTART_COUNT": "2"}, 100).requeue


def test_exit_codes_of_errors() -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    assert exit_code_of(gone) == 76
    assert exit_code_of(gone, cause=1) == 1
    assert exit_code_of(RuntimeError("a bug")) == 1
    assert exit_code_of(torch.distributed.DistNetworkError("EADDRINUSE")) == 76
    assert exit_code_of(RecipeError("x"), cause=1) == 2
    assert exit_code_of(NonFiniteLossError("x")) == 5


# --- what scontrol is asked to do -------------------------------------------------------------------------------------

AGAIN = Decision(76, True, "")


def facts(excluded: str = "(null)", nodes: int = 2, down: str = "", more: Sequence[int] = ()) -> str:
    """Of job 7 on a cluster of n1 to n4, and `more`; n5 is in another partition."""
    lines = [
        f"JobId=7 JobName=a b Requeue=1 Partition=all ExcNodeList={excluded} NumNodes={nodes}-{nodes} Command=/x y"
    ]
    for number in (1, 2, 3, 4, 5, *more):
        state = "DOWN*" if f"n{number}" == down else "IDLE"
        partitions = "all,long" if number != 5 else "long"
        lines.append(f"NodeName=n{number} NodeHostName=host{number} State={state} Partitions={partitions}  Boot=x")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("lost", "said", "update"),
    [
        ([], facts(), None),
        (["n2"], facts(), "n2"),
        (["host2"], facts(), "n2"),
        (["elsewhere"], facts(), None),
        (["n2"], facts("n[1,3]"), None),  # one node is left, and the job needs two
        (["n2"], facts("n[1-1]"), "n1,n2"),
        (["n2"], facts("n1"), "n1,n2"),
        (["n2"], facts("n[9-10]", more=(9, 10)), "n10,n2,n9"),  # as Slurm writes n9,n10
        (["n2"], facts("n[09-10]", more=(9, 10)), "n10,n2"),  # n09 and n10
        (["n1"], facts("n1"), None),
        (["n2"], facts("n1", down="n3"), None),
        (["n2", "n3"], facts(nodes=3), None),
        (["n2"], facts().replace("Partition=all ", "Partition=gpu,all "), "n2"),
        (["n2"], "", None),  # Slurm does not answer
    ],
)
def test_a_node_that_failed_is_excluded_while_enough_are_left(lost: list[str], said: str, update: str | None) -> None:
    wanted = ["requeue 7"] + ([] if update is None else [f"update JobId=7 ExcNodeList={update}"])
    assert commands(AGAIN, "7", lost, said) == wanted
    assert commands(AGAIN._replace(requeue=False), "7", lost, said) == []


def test_which_machines_a_start_has_lost(tmp_path: Path) -> None:
    environ = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}
    result = {"exit_code": 76, "lost_hosts": ["n2"], "start": start_token(environ)}
    (tmp_path / "result.json").write_text(json.dumps(result))
    assert lost_hosts(tmp_path, environ) == ["n2"]
    assert lost_hosts(tmp_path, environ | {"SLURM_RESTART_COUNT": "2"}) == []
    assert lost_hosts(None, environ) == []
    (tmp_path / "result.json").write_text("")  # as a full disk leaves it
    assert lost_hosts(tmp_path, environ) == []
    assert after_start(tmp_path, 75, environ, 100).requeue
