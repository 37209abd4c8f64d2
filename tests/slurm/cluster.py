"""A real Slurm cluster of two nodes on this host: munged, slurmctld and two slurmd, with all files in one directory."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from preloaded_ranks import preloaded_ptft
from support import ROOT, environment, free_port, wait_until

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "srun", "scontrol", "scancel", "sinfo")
SEARCH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
SLOW_PATH = f"{Path(__file__).parent / 'slow'}{os.pathsep}{ROOT}"
"""PYTHONPATH of jobs that are to be interrupted."""
NODES = ("n0", "n1")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

CONFIG = """\
ClusterName=test
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
# linuxproc signals every process of a step, where proctrack/cgroup signals the first: the harder of the two.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=5
GresTypes=gpu
{more}{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=ALL State=UP PriorityTier=9
"""


def missing() -> list[str]:
    """The programs that are not installed."""
    return [name for name in (*DAEMONS, *COMMANDS) if shutil.which(name, path=SEARCH) is None]


class Cluster:
    """All daemons on this host; a subclass gives them hosts of their own."""

    more_config = ""
    ask_every_s = 0.25  # each question starts a process

    def __init__(self, folder: Path, nodes: tuple[str, ...] = NODES) -> None:
        """folder: a short path, because the path of a socket is limited to 107 bytes."""
        self.folder, self.nodes = folder, nodes
        self.daemons: list[subprocess.Popen[bytes]] = []
        # An outer cluster's job must not shine through.
        plain = {key: value for key, value in environment().items() if not key.startswith(("SLURM_", "SBATCH_"))}
        self.variables = plain | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{preloaded_ptft()}:{SEARCH}"}

    @property
    def controller(self) -> str:
        """Name and address of the host of slurmctld."""
        return f"{socket.gethostname().split('.')[0]}(127.0.0.1)"

    def node_lines(self) -> str:
        host = socket.gethostname().split(".")[0]
        return "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=8 Gres=gpu:2"
            for node in self.nodes
        )

    def on(self, host: str | None, words: list[str]) -> list[str]:  # noqa: ARG002
        """A command line on a host; None: on that of the controller."""
        return words

    def start(self) -> None:
        for name in ("state", *self.nodes):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        known = {"controller": self.controller, "nodes": self.node_lines(), "more": self.more_config}
        (self.folder / "slurm.conf").write_text(
            CONFIG.format(port=free_port(), user=getpass.getuser(), folder=self.folder, **known)
        )
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # to count
        files = {name: f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")}
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files.values())
        wait_until((self.folder / "munge.socket").exists, f"munged; see {self.folder}", 20)
        self._daemon("slurmctld", "-D")
        for node in self.nodes:
            self._daemon("slurmd", "-D", "-N", node, host=node)
        self._until_idle()

    def _until_idle(self) -> None:
        idle = "\n".join(["idle"] * len(self.nodes))
        deadline = time.monotonic() + 60
        while self._states() != idle:
            said = "\n".join(path.read_text() for path in self.folder.glob("*.out"))
            assert time.monotonic() < deadline, f"the nodes are not idle but: {self._states()}\n{said}"
            time.sleep(0.1)

    def _daemon(self, name: str, *options: str, host: str | None = None) -> None:
        words = [shutil.which(name, path=SEARCH) or name, *options]
        if name != "munged":  # its socket is a file, which all hosts see
            words = self.on(host, words)
        setpriv = shutil.which("setpriv", path=SEARCH)
        if setpriv:  # so that not even SIGKILL to the tests leaves it running
            words = [setpriv, "--pdeathsig", "KILL", *words]
        log = (self.folder / f"{name}-{len(self.daemons)}.out").open("wb")
        quiet = subprocess.DEVNULL
        self.daemons.append(subprocess.Popen(words, env=self.variables, stdin=quiet, stdout=log, stderr=log))

    def _states(self) -> str:
        words = ["sinfo", "--Node", "--noheader", "--partition=all", "--format=%T"]
        done = subprocess.run(self.on(None, words), env=self.variables, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def stop(self) -> None:
        """End the daemons, and then the remaining processes of this cluster."""
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_CONF") == self.variables["SLURM_CONF"]:
                    process.kill()
            except psutil.Error:
                continue

    def ask(self, *words: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            self.on(None, list(words)), env=self.variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout.strip()

    def preempt(self, job: Job) -> None:
        """Let a short job of a higher priority take all nodes, and wait for it."""
        words = ["sbatch", "--parsable", f"--nodes={len(self.nodes)}", "--exclusive", "--partition=urgent"]
        urgent = Job(self, self.ask(*words, "--output=/dev/null", "--wrap=sleep 1"), Path("/dev/null"))
        job.until(lambda: urgent.fact("JobState") in ENDED, "the job that preempts it")

    def submit(
        self, *arguments: str, cwd: Path, nodes: int = 2, options: tuple[str, ...] = (), env: Mapping[str, str]
    ) -> Job:
        """Run sbatch slurm/train.sbatch. env: added to the environment of sbatch."""
        words = ["sbatch", "--parsable", f"--nodes={nodes}", *options, str(ROOT / "slurm/train.sbatch"), *arguments]
        variables = self.variables | env
        done = subprocess.run(self.on(None, words), cwd=cwd, env=variables, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        number = done.stdout.strip()
        return Job(self, number, cwd / f"ptft-{number}.log")


@contextlib.contextmanager
def running(make: Callable[[Path], Cluster]) -> Iterator[Cluster]:
    """A cluster in a new directory, which is removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = make(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def programs() -> Path:
    """The directory of the `ptft` of this Python interpreter, for jobs in which all starts are those of a user."""
    return Path(sys.executable).parent


@dataclass
class Job:
    cluster: Cluster
    number: str
    log_file: Path

    def fact(self, name: str) -> str:
        """A field of `scontrol show job`, such as JobState, ExitCode (code:signal) or Restarts."""
        text = self.cluster.ask("scontrol", "--oneliner", "show", "job", self.number)
        found = re.search(rf"(?:^| ){name}=(\S+)", text)
        assert found, text
        return found[1]

    def processes(self, **variables: str) -> list[psutil.Process]:
        """Those of the job with these environment variables."""
        wanted = {"SLURM_JOB_ID": self.number, **variables}.items()
        found = []
        for process in psutil.process_iter():
            try:
                if wanted <= process.environ().items():
                    found.append(process)
            except psutil.Error:
                continue
        return found

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
        """Wait for a condition; fail if the job ends before."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            state = self.fact("JobState")
            assert state not in ENDED or condition(), f"the job is {state} before {what}:\n{self.log}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}; the job is {state}:\n{self.log}"
            time.sleep(self.cluster.ask_every_s)

    def wait(self, timeout_s: float = 120) -> tuple[str, str]:
        """Wait for the end of the job; return JobState and ExitCode."""
        self.until(lambda: self.fact("JobState") in ENDED, "its end", timeout_s)
        return self.fact("JobState"), self.fact("ExitCode")

    def requeued(self, times: int = 1, **changes: str) -> None:
        """Wait until the job has been requeued so many times, and start it, with changed fields."""
        self.until(
            lambda: self.fact("JobState") == "PENDING" and int(self.fact("Restarts")) >= times, f"requeue {times}"
        )
        # A requeued job waits for two minutes, in which its nodes forget that its credential was revoked. They compare
        # times in whole seconds, so that the next second does here, where all have the same clock.
        time.sleep(1.1 - time.time() % 1)
        fields = [f"{name}={value}" for name, value in changes.items()]
        self.cluster.ask("scontrol", "update", f"JobId={self.number}", "StartTime=now", *fields)
