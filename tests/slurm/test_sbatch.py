"""slurm/train.sbatch on a real cluster of two nodes: it trains, resumes after a preemption, and returns failures."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import SLOW_PATH, Cluster, Job, programs
from preloaded_ranks import preloaded_ptft
from support import eval_rows, last_step, outcome, start, train_rows, write_recipe

STEPS = 120
MULTI = ("--launch", "multi_node_ddp")
NASTY = """it's "my" $(touch pwned) $$ run"""


def test_tests_of_the_cluster_stay_in_one_process(cluster: Cluster, request: pytest.FixtureRequest) -> None:
    """Otherwise two clusters compete for a port. pytest 9.2 silently ignores the groups of pytest-xdist 3.8."""
    assert cluster
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@slurm"), "groups have no effect: install what constraints.txt pins"


def some_starts_of_a_user(folder: Path) -> Path:
    """A directory with a `ptft` that is forked in most starts of a job, but not in start 1, of which a rank is killed,
    and not in start 4, which finishes."""
    program = folder / "programs/ptft"
    program.parent.mkdir()
    choice = (
        f'case "$SLURM_RESTART_COUNT" in 1|4) ptft={programs() / "ptft"} ;; *) ptft={preloaded_ptft() / "ptft"} ;; esac'
    )
    program.write_text(f'#!/bin/sh\n{choice}\nexec "$ptft" "$@"\n')
    program.chmod(0o755)
    return program.parent


def test_a_job_survives_all_that_a_cluster_does_to_it(
    cluster: Cluster, tmp_path: Path, documents: Path, cache: Path
) -> None:
    """It ends with the bits of two processes that were never stopped, with the losses of one, and with one curve."""
    folder, run_dir, recipe = tmp_path, tmp_path / NASTY, f"{NASTY}.yaml"
    write_recipe(folder, documents, train={"max_steps": STEPS}, save={"every": 5}, eval={"every": 50})
    (folder / "recipe.yaml").rename(folder / recipe)
    for name, ranks in (("whole", 2), ("alone", 1)):
        run = start("train", recipe, f"run_dir={name}", f"save.every={STEPS}", cwd=folder, cache=cache, ranks=ranks)
        assert run.wait() == 0, run.stderr

    slow = {"PYTHONPATH": SLOW_PATH, "PTFT_SLOW_STARTS": "4", "OMP_NUM_THREADS": "1"}
    slow["PATH"] = f"{some_starts_of_a_user(folder)}:{cluster.variables['PATH']}"
    words = (recipe, f"run_dir={json.dumps(NASTY)}", "data.workers=1", *MULTI)
    # Slurm sends the signal up to half a minute earlier.
    job = cluster.submit(
        *words, cwd=folder, options=("--time=60", "--signal=TERM@25"), env={"PTFT_CACHE": str(cache)} | slow
    )

    def kill_rank() -> None:
        min(job.processes(RANK="1"), key=lambda process: process.create_time()).kill()

    causes: dict[str, tuple[Callable[[], object], int]] = {
        "a job of higher priority": (lambda: cluster.preempt(job), 75),
        "a rank is killed": (kill_rank, 76),
        "a signal to the script only": (lambda: cluster.ask("scancel", "--batch", "--signal=USR1", job.number), 75),
        "the time limit": (lambda: None, 75),
    }
    updates = []
    for number, (cause, (happen, _)) in enumerate(causes.items()):
        wanted = last_step(run_dir) + 8
        if cause != "the time limit":
            job.until(lambda wanted=wanted: last_step(run_dir) >= wanted, f"8 updates before {cause}")  # type: ignore[misc]
        if number == 0:
            (rank,) = {each.environ()["PTFT_END_TIME"] for each in job.processes(RANK="0")}
            assert time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(int(rank))) == job.fact("EndTime")
        happen()
        # One minute for the start that it ends; the last start gets an hour again.
        job.requeued(number + 1, TimeLimit="1" if number == len(causes) - 2 else "60")
        updates.append(last_step(run_dir))
        assert not (run_dir / "stop").exists()
        if number == 0:
            result = json.loads((run_dir / "result.json").read_text())
            assert (result["status"], result["exit_code"], result["steps"]) == ("stopped", 75, updates[0])
            codes = re.findall(r"srun: error: (\S+): tasks? \S+: (.*)", job.log)
            assert {what for _, what in codes} == {"Exited with exit code 75"}
            assert {node for node, _ in codes} in ({"n0", "n1"}, {"n[0-1]"})
            assert "death signal" not in job.log  # torchrun, which would give the ranks five seconds
    assert "was killed by SIGKILL; perhaps the machine ran out of memory" in job.log

    assert job.wait() == ("COMPLETED", "0:0"), job.log
    assert len(train_rows(run_dir)) == STEPS
    assert outcome(run_dir) == outcome(folder / "whole")
    history = [json.loads(line) for line in (run_dir / "slurm.jsonl").read_text().splitlines()]
    assert [(row["restart"], row["exit_code"]) for row in history] == [
        *((number, code) for number, (_, code) in enumerate(causes.values())),
        (len(causes), 0),
    ]
    assert [row["requeued"] for row in history] == [True] * len(causes) + [False]
    environment = json.loads((run_dir / "environment.json").read_text())
    assert (environment["kind"], environment["world_size"]) == ("ddp", 2)
    assert not list(folder.rglob("pwned"))
    for key, get, count in (("loss", train_rows, 40), ("eval/loss", eval_rows, 1)):  # later, roundings have added up
        expected = [row[key] for row in get(folder / "alone")][:count]
        assert [row[key] for row in get(run_dir)][:count] == pytest.approx(expected, rel=1e-5)


def test_a_wrong_recipe_fails_the_job_with_its_code(cluster: Cluster, tmp_path: Path, documents: Path) -> None:
    write_recipe(tmp_path, documents)
    job = cluster.submit("recipe.yaml", "optim.learning_rate=1", *MULTI, cwd=tmp_path, env={})
    assert job.wait() == ("FAILED", "2:0"), job.log
    assert job.fact("Restarts") == "0"
    assert "optim.learning_rate: unknown key" in job.log


# --- with a stand-in for ptft -----------------------------------------------------------------------------------------


def stand_in(folder: Path, body: str) -> dict[str, str]:
    """Environment variables with which `ptft` is a shell script."""
    program = folder / "bin/ptft"
    program.parent.mkdir()
    requeue = f'if [ "$1" = requeue ]; then exec {programs() / "ptft"} "$@"; fi'
    program.write_text(f"#!/bin/bash\n{requeue}\n{body}\n")
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:/usr/local/bin:/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("options", "variables", "processes"),
    [
        ((), {}, 2),
        (("--gpus-per-node=2",), {}, 4),
        ((), {"PROCESSES_PER_NODE": "3"}, 6),
        (("--cpus-per-task=4", "--export=ALL,A=1"), {}, 2),
    ],
)
def test_each_node_gets_its_rank(
    cluster: Cluster, tmp_path: Path, options: tuple[str, ...], variables: dict[str, str], processes: int
) -> None:
    env = stand_in(tmp_path, 'printf "%s\\n" "$@" > "heard-$SLURMD_NODENAME"; echo "$SLURM_CPUS_PER_TASK" > cpus')
    job = cluster.submit("my.yaml", "a=b c", *MULTI, cwd=tmp_path, options=options, env=env | variables)
    assert job.wait() == ("COMPLETED", "0:0"), job.log
    port = 20000 + int(job.number) % 10000
    common = ["train", "my.yaml", "a=b c", *MULTI, "--processes", str(processes), "--machines", "2"]
    common += ["--address", f"127.0.0.1:{port}", "--machine-rank"]
    for rank in (0, 1):
        assert (tmp_path / f"heard-n{rank}").read_text().splitlines() == [*common, str(rank)]
    if "--cpus-per-task=4" in options:
        assert (tmp_path / "cpus").read_text() == "4\n"


def test_a_node_that_ends_first_does_not_end_the_other(cluster: Cluster, tmp_path: Path) -> None:
    body = """
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
    if [ "$SLURM_NODEID" = 0 ]; then sleep 2; touch saved; fi
    exit 75
    """
    job = cluster.submit("my.yaml", *MULTI, cwd=tmp_path, env=stand_in(tmp_path, body))
    job.requeued()
    assert (tmp_path / "saved").exists()
    assert job.wait() == ("COMPLETED", "0:0"), job.log


def test_a_job_without_progress_is_not_requeued_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("my.yaml", cwd=tmp_path, nodes=1, env=stand_in(tmp_path, "exit 75"))
    for number in (1, 2):
        job.requeued(number)
        job.until(lambda: job.fact("JobState") != "PENDING", "its start")
    assert job.wait() == ("FAILED", "75:0"), job.log
    assert job.fact("Restarts") == "2"
    assert "3 starts have ended without a new checkpoint" in job.log


def test_a_task_of_an_array_requeues_itself_alone(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm takes the id of one of the tasks for that of the whole array."""
    body = """
    echo "$SLURM_ARRAY_TASK_ID" >> starts
    if [ "${SLURM_RESTART_COUNT:-0}" = 0 ] && [ "$SLURM_ARRAY_TASK_ID" = 1 ]; then exit 75; fi
    while [ ! -e go ]; do sleep 0.1; done
    """
    env = stand_in(tmp_path, body)
    array = cluster.submit("my.yaml", cwd=tmp_path, nodes=1, options=("--array=0-1", "--output=a-%a.log"), env=env)
    first, last = (Job(cluster, f"{array.number}_{i}", tmp_path / f"a-{i}.log") for i in (0, 1))
    assert last.fact("JobId") == array.number  # it is the last task that has the id of the array
    last.requeued()
    assert first.fact("JobState") == "RUNNING"
    assert first.fact("Restarts") == "0"
    (tmp_path / "go").touch()
    assert last.wait() == ("COMPLETED", "0:0"), last.log
    assert first.wait() == ("COMPLETED", "0:0"), first.log
    assert sorted((tmp_path / "starts").read_text().split()) == ["0", "1", "1"]


def test_without_ptft_it_says_so(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("my.yaml", cwd=tmp_path, nodes=1, env={"PATH": "/usr/local/bin:/usr/bin:/bin"})
    assert job.wait() == ("FAILED", "2:0")
    assert "ptft is not on the PATH" in job.log
