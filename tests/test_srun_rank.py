"""`ptft train --starter srun`: each process is one task of srun. tests/slurm/test_submit.py has a real one."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from preloaded_ranks import preloaded_ptft
from support import COMMAND, environment, outcome, ptft, start, write_recipe

from ptft_dist.launch.srun_rank import rank_variables


def task(rank: int) -> dict[str, str]:
    """The variables of srun for one of two tasks on one node."""
    numbers = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0}
    numbers |= {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 2, "SLURM_JOB_ID": 4021}
    return {name: str(number) for name, number in numbers.items()}


def test_the_variables_of_torchrun() -> None:
    assert rank_variables(task(1)) == {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0",
    }  # fmt: skip


def test_two_tasks_train_as_two_ranks_of_zero3(tmp_path: Path, documents: Path, cache: Path) -> None:
    """The launch config has the same effect as with a launcher; so have special characters in the recipe's name. One
    of the two is a start as a user's, with all its imports."""
    name = "it's $$ mine.yaml"
    write_recipe(tmp_path, documents, train={"max_steps": 4}, save={"every": 2}, eval={"every": 2})
    (tmp_path / "recipe.yaml").rename(tmp_path / name)
    words = ["train", name, "--launch", "cpu_zero3", "--processes", "2", "--starter", "srun"]
    ranks = [
        subprocess.Popen(
            [*command, *words],
            cwd=tmp_path,
            env=environment({"PTFT_CACHE": str(cache), "OMP_NUM_THREADS": "1", **task(rank)}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate((COMMAND, [str(preloaded_ptft() / "ptft")]))
    ]
    errors = [rank.communicate()[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    known = json.loads((tmp_path / "run/environment.json").read_text())
    assert (known["kind"], known["world_size"]) == ("zero3", 2)
    run = start("train", name, "run_dir=forked", cwd=tmp_path, cache=cache, ranks=2, kind="cpu_zero3")
    assert run.wait() == 0, run.stderr
    ours, forked = outcome(tmp_path / "run"), outcome(tmp_path / "forked")
    assert [ours[key] for key in ("model", "rows", "status")] == [forked[key] for key in ("model", "rows", "status")]


@pytest.mark.parametrize(("starter", "env"), [("srun", {}), ("mpirun", task(0))])
def test_a_starter_that_is_not_there(tmp_path: Path, documents: Path, starter: str, env: dict[str, str]) -> None:
    write_recipe(tmp_path, documents)
    done = ptft("train", "recipe.yaml", "--launch", "cpu", "--starter", starter, cwd=tmp_path, env=env)
    message = f"error: --starter: {starter}: use accelerate, or srun within a task of srun\n"
    assert (done.returncode, done.stderr) == (2, message)
