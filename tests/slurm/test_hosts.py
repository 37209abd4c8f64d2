"""Jobs on hosts that die, on a cluster of three hosts with addresses of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster as programs
import hosts as namespaces
import pytest
from hosts import Hosts
from support import last_step, outcome, start, write_recipe

STEPS = 60


@pytest.fixture(scope="module")
def three() -> Iterator[Hosts]:
    if absent := [*programs.missing(), *namespaces.missing()]:
        pytest.skip(f"no cluster of hosts here: {', '.join(absent)} missing")
    with programs.running(lambda folder: Hosts(folder, 3)) as started:
        assert isinstance(started, Hosts)
        yield started


def write(folder: Path, documents: Path) -> None:
    write_recipe(folder, documents, train={"max_steps": STEPS}, save={"every": 20}, eval={"every": 30})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, documents: Path, cache: Path) -> dict[str, Any]:
    """What comes out of a run that lost no host."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder, documents)
    run = start("train", "recipe.yaml", cwd=folder, cache=cache, ranks=2)
    assert run.wait() == 0, run.stderr
    return outcome(folder / "run")


@pytest.mark.parametrize("fate", ["dies", "is cut off"])
def test_a_lost_host_is_replaced(
    three: Hosts, tmp_path: Path, documents: Path, cache: Path, whole: dict[str, Any], fate: str
) -> None:
    """The job goes on with another host, and ends with the bits of a run that lost none. A host that is cut off has
    prepared the data in a cache of its own."""
    write(tmp_path, documents)
    env = {"PTFT_CACHE": str(cache if fate == "dies" else three.local / "cache"), "OMP_NUM_THREADS": "1"}
    job = three.submit("recipe.yaml", "--launch", "multi_node_ddp", cwd=tmp_path, env=env)
    job.until(lambda: last_step(tmp_path / "run") >= 30, "update 30")
    assert job.fact("NodeList") == "h[1-2]"
    if fate == "dies":
        three.kill_host("h2")
    else:
        three.cut("h2")
    job.until(lambda: job.fact("Restarts") == "1", "its requeue")
    job.until(lambda: job.fact("JobState") == "PENDING", "the end of its first start")
    job.requeued()
    assert job.wait(240) == ("COMPLETED", "0:0"), job.log
    assert job.fact("NodeList") == "h[1,3]"
    assert outcome(tmp_path / "run") == whole
    lost, last = [json.loads(line) for line in (tmp_path / "run/slurm.jsonl").read_text().splitlines()]
    assert (lost["restart"], lost["exit_code"], lost["requeued"]) == (0, 76, True)
    assert (last["exit_code"], last["update"], last["nodes"]) == (0, STEPS, "h[1,3]")
    three.bring_back("h2")
