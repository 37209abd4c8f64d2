"""A machine that is gone is noticed, told to the others and reported; a regular end and strangers are not."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_ranks import start_ranks
from support import Start, start, write_recipe

from ptft_dist.engine import machines as module
from ptft_dist.engine.machines import Loss, Machines, Patience, machine_of, watch_machines
from ptft_dist.errors import MachineLostError
from ptft_dist.launch.environment import Place, start_token
from ptft_dist.launch.result import write_failure
from ptft_dist.reporting.run_files import FailureReport

QUICK = Patience(idle_s=1, interval_s=1, probes=2)


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, documents: Path) -> Path:
    write_recipe(tmp_path, documents, train={"max_steps": 500}, eval={"every": None}, save={"every": None})
    return tmp_path


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run/result.json").read_text())
    return found


def run_on_machines(folder: Path, cache: Path, *patches: str, count: int = 2) -> Start:
    """Ranks that are each on a machine of their own, which is called rank-RANK."""
    words, patches = ("train", "recipe.yaml", "batch.micro_size=2"), ("a_machine_for_each_rank", *patches)
    return start(*words, cwd=folder, cache=cache, ranks=count, patches=patches)


def test_a_killed_machine_is_named_by_the_rank_whose_collective_fails(folder: Path, cache: Path) -> None:
    run = run_on_machines(folder, cache, "die_in_rank:1:3")
    assert run.wait(40) == 76, run.stderr
    assert "by peer" in run.stderr
    found = result(folder)
    assert (found["status"], found["exit_code"], found["lost_hosts"]) == ("failed", 76, ["rank-1"])
    assert "Lost: rank-1." in found["error"]
    assert found["host"] == "rank-0"


def test_all_other_machines_say_that_one_is_lost(folder: Path, cache: Path) -> None:
    """Whichever of them announces its failure first."""
    run = run_on_machines(folder, cache, "die_in_rank:2:3", count=3)
    assert run.wait(60) == 76, run.stderr
    assert run.exit_codes == [76, 76, -9]
    found = result(folder)
    assert (found["exit_code"], found["lost_hosts"]) == (76, ["rank-2"])


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_machine_ends_a_rank_whose_collective_waits(folder: Path, cache: Path, lost: int) -> None:
    """As with NCCL, or a machine that is cut off: no collective returns."""
    waiting = 1 - lost
    run = run_on_machines(folder, cache, f"wait_in_rank:{waiting}:3", f"die_in_rank:{lost}:3", "short_grace:1")
    began = time.monotonic()
    run.processes[waiting].join(40)
    assert run.exit_codes[waiting] == 76, run.stderr
    assert time.monotonic() - began < 40
    assert f"error: machine rank-{lost} has ended" in run.stderr
    assert "Traceback" not in run.stderr
    found = result(folder)
    assert (found["exit_code"], found["lost_hosts"]) == (76, [f"rank-{lost}"])
    assert found["error"] == f"machine rank-{lost} has ended"


def test_the_failure_of_a_rank_is_not_a_lost_machine(folder: Path, cache: Path) -> None:
    """Whether the other rank's collective fails or waits."""
    for patches in (["raise_in_rank:1:3"], ["wait_in_rank:0:3", "raise_in_rank:1:3", "short_grace:1"]):
        shutil.rmtree(folder / "run", ignore_errors=True)
        run = run_on_machines(folder, cache, *patches)
        assert run.wait(40) == 1, run.stderr
        assert set(run.exit_codes) == {1}
        found = result(folder)
        assert found["exit_code"] == 1
        assert "made to fail by a test" in found["error"]
        assert found["host"] == "rank-1"
        assert "lost_hosts" not in found


def test_a_full_disk_of_one_machine_is_the_cause_on_all(folder: Path, cache: Path) -> None:
    run = run_on_machines(folder, cache, "full_disk_in_rank:1:3")
    assert run.wait(40) == 78, run.stderr
    assert set(run.exit_codes) == {78}
    assert result(folder)["exit_code"] == 78
    assert "The disk is full or the quota is used up" in run.stderr


def test_a_regular_end_is_no_loss(folder: Path, cache: Path) -> None:
    run = start(
        "train", "recipe.yaml", "train.max_steps=4", cwd=folder, cache=cache, ranks=2,
        patches=["a_machine_for_each_rank", "short_grace:0", "end_late_in_rank:1:2"],
    )  # fmt: skip
    assert run.wait(40) == 0, run.stderr
    assert set(run.exit_codes) == {0}
    assert result(folder)["status"] == "finished"


def test_a_machine_that_cannot_connect_trains_all_the_same(folder: Path, cache: Path) -> None:
    run = start(
        "train", "recipe.yaml", "train.max_steps=4", cwd=folder, cache=cache, ranks=2,
        patches=["a_machine_for_each_rank", "no_connection_between_machines"],
    )  # fmt: skip
    assert run.wait(40) == 0, run.stderr
    assert "the loss of a machine is noticed only after a timeout" in run.stderr


# --- which ranks are connected ----------------------------------------------------------------------------------------


def test_the_number_of_the_machine() -> None:
    assert machine_of({"GROUP_RANK": "1", "SLURM_NODEID": "0"}) == machine_of({"GROUP_RANK": "1"})
    assert machine_of({"GROUP_RANK": "1"}) != machine_of({"GROUP_RANK": "0"})
    assert machine_of({"SLURM_NODEID": "1"}) != machine_of({"SLURM_NODEID": "0"})
    assert machine_of({}) == socket.gethostname()


def test_one_machine_has_no_thread_and_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    asked = []

    def gather(value: Any) -> list[Any]:
        asked.append(value)
        return [value] * 4

    assert watch_machines(0, gather, lambda _: None, lambda _: None) is None
    assert len(asked) == 1


# --- the protocol -----------------------------------------------------------------------------------------------------


class First:
    """Machines on rank 0 of four, and what it reports."""

    def __init__(self, grace_s: float = 0.1) -> None:
        self.losses: list[Loss] = []
        self.listener = module._listen()
        hosts = {0: "h1", 2: "h2", 4: "h3", 6: "h4"}
        self.machines = Machines(hosts, self.losses.append, QUICK, self.listener, "secret", grace_s)
        self.port = self.listener.getsockname()[1]
        self.machines.start()

    def connect(self, *lines: str) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        connection.sendall("".join(f"{line}\n" for line in lines).encode())
        return connection

    def join(self, rank: int) -> socket.socket:
        connection = self.connect(f"hello secret {rank}")
        self.until(lambda: any(peer.host == f"h{rank // 2 + 1}" for peer in list(self.machines.peers.values())))
        return connection

    def until(self, condition: Any) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def first() -> Iterator[First]:
    made = First()
    yield made
    made.machines.close()


def refused(stranger: socket.socket) -> bool:
    try:
        return stranger.recv(10) == b""
    except ConnectionResetError:  # its line was not read to the end
        return True


def test_strangers_are_dropped_and_change_nothing(first: First) -> None:
    for line in ("hello wrong 2", "hello", "GET / HTTP/1.1", "bye", 'lost [["h2"], "x", 1]', "x" * 5000):
        assert refused(first.connect(line))
    silent = first.connect()
    silent.close()
    time.sleep(0.3)
    assert first.losses == []
    assert first.machines.loss is None


def test_nobody_is_listened_to_when_all_are_here(first: First) -> None:
    stranger = first.connect()
    members = [first.join(rank) for rank in (2, 4, 6)]
    assert refused(stranger)
    with pytest.raises(ConnectionRefusedError):
        first.connect()
    for member in members:
        member.sendall(b"bye\n")
        member.close()
    time.sleep(0.3)
    assert first.losses == []


def test_all_are_told_of_a_loss(first: First) -> None:
    two, four = first.join(2), first.join(4)
    two.close()
    first.until(lambda: first.losses)
    loss = Loss(("h2",), "machine h2 has ended")
    assert first.losses == [loss]
    told = four.recv(1000).decode()
    assert told.splitlines()[0] == "lost " + json.dumps(loss)

    heard: list[Loss] = []
    ours, theirs = socket.socketpair()
    other = Machines({0: "h1", 4: "h3"}, heard.append, QUICK, grace_s=0.1)
    other.peers[ours] = module._Peer("h1")
    other._selector.register(ours, 1)
    other.start()
    theirs.sendall(told.encode())
    theirs.close()  # rank 0 ends; it is not lost
    first.until(lambda: heard)
    assert heard == [loss]


def test_two_lost_machines_and_one_that_fails_because_of_them() -> None:
    first = First(grace_s=0.5)
    two, four, six = (first.join(rank) for rank in (2, 4, 6))
    two.close()
    first.until(lambda: first.machines.loss)
    four.sendall(b"failed 76\n")
    four.close()
    six.close()
    first.until(lambda: first.losses)
    assert first.losses == [Loss(("h2", "h4"), "machine h2 has ended")]


def test_the_main_thread_may_end_by_itself() -> None:
    first = First(grace_s=0.3)
    first.join(2).close()
    loss = first.machines.known_loss(5)
    assert loss is not None
    assert loss.hosts == ("h2",)
    first.machines.take_over()
    time.sleep(0.6)
    assert first.losses == []


def test_a_process_that_fails_says_so(first: First) -> None:
    two = first.join(2)
    two.sendall(b"failed 3\n")
    two.close()
    first.until(lambda: first.losses)
    assert first.losses == [Loss((), "a process on machine h2 has failed", 3)]


# --- result.json ------------------------------------------------------------------------------------------------------


def test_the_first_failure_stays_in_result_json(tmp_path: Path) -> None:
    write_failure(tmp_path, {"exit_code": 1, "error": "a bug"})
    write_failure(tmp_path, {"exit_code": 76, "error": "lost"}, ["h2"])
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["status"], found["exit_code"], found["error"]) == ("failed", 1, "a bug")
    assert "lost_hosts" not in found


def test_the_failure_of_an_earlier_start_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for restart, error in (("0", "a bug"), ("1", "lost")):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        write_failure(tmp_path, {"exit_code": 76, "error": error}, [f"h{restart}"])
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["error"], found["lost_hosts"]) == ("lost", ["h1"])


def test_lost_hosts_are_added_to_a_loss(tmp_path: Path) -> None:
    write_failure(tmp_path, {"exit_code": 76, "error": "closed by peer"})
    write_failure(tmp_path, {"exit_code": 76, "error": "machine h2 has ended"}, ["h2"])
    write_failure(tmp_path, {"exit_code": 76, "error": "machine h3 has ended"}, ["h2", "h3"])
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["error"], found["lost_hosts"]) == ("closed by peer", ["h2", "h3"])


def test_a_machine_that_was_cut_off_leaves_the_result_of_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It notices late, and still sees the disk."""
    (tmp_path / "logs").mkdir()

    def start(restart: int) -> FailureReport:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        return FailureReport(tmp_path, Place(rank=1, local_rank=0, world_size=2, launched=True))

    def rank_0_writes(name: str) -> None:
        (tmp_path / name).write_text(json.dumps({"status": "finished", "start": start_token(os.environ)}))

    def fail(report: FailureReport) -> str:
        report.write(MachineLostError("machine h1 does not answer any more"), 76, 1.0, None, ["h1"])
        found: str = json.loads((tmp_path / "result.json").read_text())["status"]
        return found

    start(0)
    rank_0_writes("environment.json")
    early = start(1)
    early.begin()  # before rank 0, which has a long list of files to write
    assert fail(early) == "failed"
    rank_0_writes("environment.json")
    late = start(1)
    late.begin()
    assert fail(late) == "failed"
    start(2)
    rank_0_writes("environment.json")
    rank_0_writes("result.json")
    start(1)
    assert fail(late) == "finished"


# --- a link that is cut -----------------------------------------------------------------------------------------------

BRIDGED = ("w1", "w2")


def network(*words: str, check: bool = True) -> bool:
    return subprocess.run(["ip", *words], capture_output=True, check=check).returncode == 0


@pytest.fixture
def two_hosts() -> Iterator[None]:
    """The network namespaces w1 and w2, with a link between them."""
    if os.geteuid() != 0 or shutil.which("ip") is None or not network("netns", "add", BRIDGED[0], check=False):
        pytest.skip("needs the right to make network namespaces")
    try:
        network("netns", "add", BRIDGED[1])
        network("link", "add", "e1", "netns", "w1", "type", "veth", "peer", "name", "e2", "netns", "w2")
        for i in ("1", "2"):
            network("-n", f"w{i}", "addr", "add", f"10.78.0.{i}/24", "dev", f"e{i}")
            network("-n", f"w{i}", "link", "set", f"e{i}", "up")
        yield
    finally:
        for name in BRIDGED:
            network("netns", "del", name, check=False)


def in_namespaces(folder: str) -> Any:
    """Rank 0 on w1, rank 1 on w2: what each learns when the link is cut, and after how long."""
    rank, host = int(os.environ["RANK"]), BRIDGED[int(os.environ["RANK"])]
    with Path(f"/var/run/netns/{host}").open() as namespace:
        assert module_setns(namespace.fileno()) == 0
    os.environ |= {"MASTER_ADDR": "10.78.0.1", "GROUP_RANK": str(rank)}
    losses: list[Loss] = []
    module.GRACE_S = 0.2
    calls = iter(range(9))

    def gather(value: Any) -> list[Any]:
        """Through files, since the two have no process group."""
        number = next(calls)
        partial = Path(folder, f"partial-{rank}")
        partial.write_text(json.dumps(value))
        partial.rename(Path(folder, f"said-{number}-{rank}"))
        both = [Path(folder, f"said-{number}-{other}") for other in range(2)]
        while not all(path.exists() for path in both):
            time.sleep(0.01)
        return [json.loads(path.read_text()) for path in both]

    socket.gethostname = lambda: host  # type: ignore[assignment]
    machines = watch_machines(rank, gather, losses.append, print, QUICK)
    assert machines is not None
    time.sleep(4.5)  # an idle connection on a good link stays
    assert machines.loss is None
    if rank == 0:
        while not machines.peers:
            time.sleep(0.01)
    gather("ready")
    cut = time.monotonic()
    if rank == 0:
        network("-n", "w1", "link", "set", "e1", "down")
    while not losses:
        assert time.monotonic() - cut < 20
        time.sleep(0.02)
    return losses[0], time.monotonic() - cut


def module_setns(descriptor: int) -> int:
    import ctypes

    return int(ctypes.CDLL(None).setns(descriptor, 0x40000000))


@pytest.mark.usefixtures("two_hosts")
def test_the_kernel_notices_a_link_that_is_cut(tmp_path: Path) -> None:
    run = start_ranks(in_namespaces, str(tmp_path), folder=tmp_path)
    assert run.wait(60) == 0, run.stderr
    import pickle

    for rank in range(2):
        loss, waited_s = pickle.loads((tmp_path / f"result-{rank}").read_bytes())
        other = BRIDGED[1 - rank]
        assert loss == Loss((other,), f"machine {other} does not answer any more (no packet for 3 s)")
        assert waited_s < 6


def test_a_lost_host_is_noticed_within_a_minute() -> None:
    assert module.PATIENCE.total_s + module.GRACE_S < 60
