"""A Slurm job that nobody looks after: its starts end by causes that are drawn, and it must end as if nothing had been.

    sudo python benchmarks/unattended.py [--starts 30] [--seed 0]

Three hosts as network namespaces; the job trains on two of them. Causes: the time limit, a job of higher priority, a
host that dies, a host whose link is cut, SIGTERM, a disk that is full for a while, a rank that is killed, `scontrol
requeue`. Weights, optimizer and metrics must be equal to the bit to those of a run that was never stopped, the curve
in TensorBoard must be whole, and the history must tell every cause. What takes long on a cluster is short here: the two
minutes before a requeued job starts, the timeout for hosts (20 s), and the time between causes.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/slurm"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from cluster import Job, programs, running
from hosts import Hosts
from support import ROOT, curves, last_step, outcome, start, write_documents, write_recipe

from ptft_dist.slurm.requeue import history


class Week:
    """The causes, and what is repaired before the next start."""

    def __init__(self, hosts: Hosts, job: Job, disk: Path, chance: random.Random) -> None:
        self.hosts, self.job, self.disk, self.chance = hosts, job, disk, chance
        self.lost: str | None = None
        self.causes: dict[str, tuple[Callable[[], None], str]] = {
            "time limit": (lambda: None, "stopped"),
            "preemption": (lambda: hosts.preempt(job), "stopped"),
            "host dies": (self._kill_host, "lost|Slurm itself"),
            "link is cut": (self._cut, "lost|Slurm itself|stopped"),
            "SIGTERM": (self._signal, "stopped"),
            "scontrol requeue": (lambda: self._ask("scontrol", "requeue", job.number), "stopped|lost|Slurm itself"),
            "disk is full": (self._fill_disk, "disk"),
            "rank is killed": (self._kill_rank, "lost"),
        }

    def _ask(self, *words: str) -> None:
        self.hosts.ask(*words)

    def _nodes(self) -> list[str]:
        return self.hosts.ask("scontrol", "show", "hostnames", self.job.fact("NodeList")).split()

    def _kill_host(self) -> None:
        self.lost = self.chance.choice(self._nodes())
        self.hosts.kill_host(self.lost)

    def _cut(self) -> None:
        self.lost = self.chance.choice(self._nodes())
        self.hosts.cut(self.lost)

    def _signal(self) -> None:
        self.hosts.ask("scancel", "--signal=TERM", self.job.number)

    def _kill_rank(self) -> None:
        ranks = self.job.processes(RANK=self.chance.choice("01"))
        min(ranks, key=lambda process: process.create_time()).kill()

    def _fill_disk(self) -> None:
        with (self.disk / "filler").open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 20))
            except OSError:
                pass
        self._signal()

    def repair(self) -> None:
        (self.disk / "filler").unlink(missing_ok=True)
        if self.lost is not None:
            self.hosts.bring_back(self.lost)
            self.lost = None


def drawn(causes: list[str], starts: int, chance: random.Random) -> list[str]:
    """Each cause as often as the others."""
    found = [causes[i % len(causes)] for i in range(starts)]
    chance.shuffle(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    chance, began = random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="week-") as name, running(lambda folder: Hosts(folder, 3)) as hosts:
        assert isinstance(hosts, Hosts)
        folder = Path(name)
        live(folder, hosts, options.starts, chance)
    print(f"{options.starts} starts in {(time.monotonic() - began) / 60:.1f} minutes")


def live(folder: Path, hosts: Hosts, starts: int, chance: random.Random) -> None:
    """Train once without and once with causes, and compare."""
    disk = hosts.disk
    documents = write_documents(folder / "text.txt")
    steps = 25 * starts
    write_recipe(folder, documents, train={"max_steps": steps}, save={"every": 3, "keep": 2}, eval={"every": 50})
    whole = start("train", "recipe.yaml", "run_dir=whole", cwd=folder, cache=folder / "cache", ranks=2)
    if whole.wait(timeout_s=600):
        raise SystemExit(whole.stderr)
    run_dir = disk / "run"
    env = {"PTFT_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1", "PTFT_SLOW_STARTS": str(starts)}
    env["PYTHONPATH"] = f"{ROOT / 'tests/slurm/slow'}:{os.environ.get('PYTHONPATH', '')}"
    words = ("recipe.yaml", f"run_dir={run_dir}", "--launch", "multi_node_ddp")
    job = hosts.submit(*words, cwd=folder, options=("--time=60", "--signal=TERM@1"), env=env)
    week = Week(hosts, job, disk, chance)
    causes = drawn(list(week.causes), starts, chance)
    for number, cause in enumerate(causes):
        if cause != "time limit":
            wanted = last_step(run_dir) + chance.randint(7, 12)
            job.until(lambda wanted=wanted: last_step(run_dir) >= wanted, f"update {wanted}", 300)  # type: ignore[misc]
        week.causes[cause][0]()
        job.until(lambda number=number: int(job.fact("Restarts")) > number, f"a requeue after: {cause}", 300)  # type: ignore[misc]
        job.until(lambda: job.fact("JobState") == "PENDING", "the end of this start", 300)
        hosts.ask("scontrol", "update", f"JobId={job.number}", "StartTime=now+30minutes")  # so long may a repair take
        print(f"start {number + 1}: update {last_step(run_dir)}, {cause}", flush=True)
        week.repair()
        following = "1" if causes[number + 1 : number + 2] == ["time limit"] else "60"
        job.requeued(number + 1, TimeLimit=following)
    state = job.wait(600)
    if state != ("COMPLETED", "0:0"):
        raise SystemExit(f"{state}\n{job.log[-5000:]}")
    compare(folder / "whole", run_dir)
    told = [row["cause"] for row in history(run_dir)]
    for cause, text in zip(causes, told, strict=False):
        if not any(each in text for each in week.causes[cause][1].split("|")):
            raise SystemExit(f"{cause}: the history says: {text}")
    if len(told) != starts + 1:
        raise SystemExit(f"{len(told)} lines in the history")
    print(f"causes: {dict(Counter(causes))}; history: {dict(Counter(told))}")
    status = subprocess.run([programs() / "ptft", "status", run_dir], env=hosts.variables, cwd=folder, check=False)
    assert status.returncode == 0


def compare(whole: Path, run_dir: Path) -> None:
    expected, found = ({**outcome(each), "curves": curves(each)} for each in (whole, run_dir))
    different = [key for key in expected if found[key] != expected[key]]
    if different:
        raise SystemExit(f"different: {', '.join(different)}")
    print(f"equal to the bit: {', '.join(expected)}")


if __name__ == "__main__":
    main()
