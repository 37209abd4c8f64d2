"""Stop requests and dying ranks: the exit code is distinct for each cause, and no process is left waiting."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from preloaded_ranks import preloaded
from support import COMMAND, ROOT, environment, last_step, lives, outcome, rows, start, wait_until, write_recipe

from ptft_dist.launch.environment import end_of_job, start_token
from ptft_dist.training.stopping import StopRequest

STEPS = 40
SLOW = ["slow_updates:0.05"]


def prepare_folder(folder: Path, documents: Path, steps: int = STEPS) -> None:
    dropout = {"config": {"attention_dropout": 0.1}}
    write_recipe(folder, documents, model=dropout, train={"max_steps": steps}, save={"every": 30}, eval={"every": None})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, documents: Path, cache: Path) -> Callable[[int], dict[str, Any]]:
    """The outcome of a run that was never stopped, by its number of ranks."""
    finished: dict[int, dict[str, Any]] = {}

    def provide(ranks: int) -> dict[str, Any]:
        if ranks not in finished:
            folder = tmp_path_factory.mktemp("whole")
            prepare_folder(folder, documents)
            run = start("train", "recipe.yaml", cwd=folder, cache=cache, ranks=ranks)
            assert run.wait() == 0, run.stderr
            finished[ranks] = outcome(folder / "run")
        return finished[ranks]

    return provide


def stopped_at(run_dir: Path, reason: str) -> int:
    """Check that the run reports the stop and has saved its last update; return this update."""
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("stopped", 75)
    assert reason in result["reason"]
    step: int = result["steps"]
    assert 0 < step < STEPS
    assert last_step(run_dir) == step
    assert (run_dir / f"checkpoints/step-{step:08d}/manifest.json").exists()
    assert not (run_dir / "model").exists()
    return step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_one_process(
    tmp_path: Path, documents: Path, cache: Path, whole: Callable[[int], dict[str, Any]], number: int
) -> None:
    prepare_folder(tmp_path, documents)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=SLOW)
    run.until(lambda: last_step(tmp_path / "run") >= 2, "update 2")
    os.kill(run.processes[0].pid or 0, number)
    assert run.wait() == 75, run.stderr
    step = stopped_at(tmp_path / "run", signal.Signals(number).name)

    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert f"resumed from run/checkpoints/step-{step:08d}" in run.stderr
    assert outcome(tmp_path / "run") == whole(1)


def test_a_stop_file_for_two_processes(
    tmp_path: Path, documents: Path, cache: Path, whole: Callable[[int], dict[str, Any]]
) -> None:
    prepare_folder(tmp_path, documents)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, patches=SLOW)
    run.until(lambda: last_step(tmp_path / "run") >= 2, "update 2")
    (tmp_path / "run/stop").touch()
    assert run.wait() == 75, run.stderr
    assert run.exit_codes == [75, 75]
    stopped_at(tmp_path / "run", "run/stop")
    assert not (tmp_path / "run/stop").exists()

    # A file that the launcher of an earlier start has left does not stop this one.
    (tmp_path / "run/stop").write_text("stopped by the launcher of Slurm job 7, restart 0")
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2)
    assert run.wait() == 0, run.stderr
    assert outcome(tmp_path / "run") == whole(2)
    assert not (tmp_path / "run/stop").exists()


def test_whose_stop_file_is_obeyed(tmp_path: Path) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}
    before = {**job, "SLURM_RESTART_COUNT": "1"}
    alone = [start_token({}), start_token({})]
    assert alone[0] != alone[1]
    assert start_token({}, "a:1") == start_token({}, "a:1") != start_token({}, "a:2")
    file = tmp_path / "stop"
    for written, stops in (
        ("", True),  # touch
        ("please", True),
        (start_token(job), True),
        (start_token(before), False),
        (start_token({"SLURM_JOB_ID": "8"}), False),
        (alone[0], False),
    ):
        file.write_text(written)
        assert StopRequest(file, start_token(job)).requested() == stops, written
        assert file.exists() == stops
    assert start_token({"PTFT_START_TOKEN": alone[0], **job}) == alone[0]  # given by the launcher to its ranks


@pytest.mark.parametrize(
    ("left_s", "save_s", "phase_s", "stops"),
    [
        (1000, 100, 0, False),
        (229, 100, 0, True),  # 2 x 100 s and the margin of 30 s
        (231, 100, 0, False),
        (249, 100, 10, True),
        (251, 100, 10, False),
        (1, 0, 10, False),  # no save has been measured: Slurm's signal decides
        (-5, 1, 1, True),
    ],
)
def test_a_run_stops_before_the_end_of_its_job(left_s: float, save_s: float, phase_s: float, stops: bool) -> None:
    stop = StopRequest(None, end=time.time() + left_s)
    stop.took(phase_s=1000)
    stop.took(save_s=save_s / 2)
    stop.took(save_s=save_s)
    stop.took(save_s=save_s / 3)
    stop.took(phase_s=phase_s)
    assert stop.requested() == stops
    assert (stop.reason or "").startswith("the end of the job at ") == stops
    assert not StopRequest(None).requested()


def test_the_end_of_a_job_in_its_environment() -> None:
    assert end_of_job({"PTFT_END_TIME": "1795950000"}) == 1795950000
    assert end_of_job({"PTFT_END_TIME": ""}) is None
    assert end_of_job({}) is None


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_end_without_destroying_their_group(tmp_path: Path, documents: Path, cache: Path, ranks: int) -> None:
    """gloo's destructor can block forever, see Engine.close. Data workers end with their rank."""
    prepare_folder(tmp_path, documents, steps=2)
    place: dict[str, Any] = {"cwd": tmp_path, "cache": cache, "ranks": ranks}
    run = start("train", "recipe.yaml", "data.workers=1", patches=["watch_engine"], **place)
    run.until(lambda: last_step(tmp_path / "run") >= 1, "an update")
    family = [child for rank in run.processes for child in psutil.Process(rank.pid).children()]
    assert len(family) == ranks
    assert run.wait() == 0, run.stderr
    wait_until(lambda: not any(map(lives, family)), "the readers to end", timeout_s=5)
    assert [path.name for path in tmp_path.glob("destroyed-*")] == (["destroyed-0"] if ranks == 1 else [])


@pytest.mark.parametrize(("patches", "code", "status"), [([], 0, "finished"), (["raise_in_rank:0:2"], 1, "failed")])
def test_a_signal_after_the_updates_loses_nothing(
    tmp_path: Path, documents: Path, cache: Path, patches: list[str], code: int, status: str
) -> None:
    """For example while the model is exported, or from torchrun while a rank reports its failure."""
    prepare_folder(tmp_path, documents, steps=3)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=["sigterm_after_updates", *patches])
    assert run.wait() == code, run.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["status"], result["exit_code"]) == (status, code)
    assert (tmp_path / "run/model").exists() == (status == "finished")


# --- through the launcher ---------------------------------------------------------------------------------------------


@pytest.fixture
def launched(tmp_path: Path, documents: Path, cache: Path) -> Iterator[Callable[..., psutil.Popen]]:
    """Start a command in the background; kill its remaining processes at the end."""
    prepare_folder(tmp_path, documents, steps=4000)
    running: list[psutil.Popen] = []

    def begin(words: list[str]) -> psutil.Popen:
        stderr = (tmp_path / "stderr").open("w")
        variables = environment({"PTFT_CACHE": str(cache), **preloaded()})
        command = psutil.Popen(words, cwd=tmp_path, env=variables, stdout=subprocess.DEVNULL, stderr=stderr)
        running.append(command)
        wait_until(lambda: last_step(tmp_path / "run") >= 2 or command.poll() is not None, "update 2", timeout_s=120)
        return command

    yield begin
    for command in running:
        family = [command, *command.children(recursive=True)] if command.is_running() else []
        for process in family:
            process.kill()


TWO = [*COMMAND, "train", "recipe.yaml", "--launch", "cpu", "--processes", "2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_command_that_launched_two_processes(
    tmp_path: Path, cache: Path, launched: Callable[..., psutil.Popen], number: int
) -> None:
    """SIGUSR1 to all its processes, as Slurm sends it."""
    command = launched(TWO)
    family = command.children(recursive=True)
    for process in [command, *family] if number == signal.SIGUSR1 else [command]:
        process.send_signal(number)
    assert command.wait(timeout=60) == 75
    assert not any(map(lives, family))
    run_dir = tmp_path / "run"
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("stopped", 75)
    said = (tmp_path / "stderr").read_text()
    assert "Traceback" not in said  # of torchrun, for which exit code 75 is a failure
    assert f"after update {result['steps']}; saved to" in said
    assert not (run_dir / "stop").exists()
    step = result["steps"]
    assert last_step(run_dir) == step

    # The next start goes on there, with the bits of a run that was never stopped, and is not stopped again.
    for name in ("run", "whole"):
        run = start("train", "recipe.yaml", f"run_dir={name}", cwd=tmp_path, cache=cache, ranks=2)
        run.until(lambda folder=tmp_path / name: last_step(folder) >= step + 3, "three more updates")
        run.kill()
        assert (f"resumed from run/checkpoints/step-{step:08d}" in run.stderr) == (name == "run")
    assert rows(run_dir)[: step + 3] == rows(tmp_path / "whole")[: step + 3]


def test_a_rank_that_is_killed_ends_the_others(tmp_path: Path, launched: Callable[..., psutil.Popen]) -> None:
    command = launched(TWO)
    family = command.children(recursive=True)
    ranks = [process for process in family if process.environ().get("RANK") == "1"]
    victim = min(ranks, key=lambda process: process.create_time())
    died = time.monotonic()
    victim.kill()
    code = command.wait(timeout=60)
    psutil.wait_procs(family, timeout=20)
    assert time.monotonic() - died < 20
    assert code not in (0, 75)
    assert not any(map(lives, family))
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "failed"
    said = (tmp_path / "stderr").read_text()
    assert f"rank 1 on {socket.gethostname()} was killed by SIGKILL" in said
    assert "torchrun" not in said
    assert "ChildFailedError" not in said


@pytest.mark.parametrize("processes", [1, 2])
def test_the_launcher_leaves_a_result_if_no_rank_could(
    tmp_path: Path, launched: Callable[..., psutil.Popen], processes: int
) -> None:
    """All ranks are killed at once."""
    command = launched([*TWO[:-1], str(processes)])
    ranks = [each for each in command.children(recursive=True) if "-m ptft_dist train" in " ".join(each.cmdline())]
    ranks = [each for each in ranks if "accelerate_launch" not in " ".join(each.cmdline())]
    assert len(ranks) >= processes
    for each in ranks:
        each.suspend()  # so that none of them reports the end of another
    for each in ranks:
        each.kill()
    assert command.wait(timeout=60) == 76
    result = json.loads((tmp_path / "run/result.json").read_text())
    host = socket.gethostname()
    assert (result["status"], result["exit_code"], result["host"]) == ("failed", 76, host)
    assert "lost_hosts" not in result  # the machine may be sound
    assert f"rank 0 on {host} was killed by SIGKILL" in result["error"]


def test_a_rank_that_raises_is_named(tmp_path: Path, launched: Callable[..., psutil.Popen]) -> None:
    accelerate = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "launch_configs/cpu.yaml"),
    ]
    accelerate += ["--num_processes", "2", "--main_process_port", "0"]
    command = launched([*accelerate, str(ROOT / "tests/patches.py"), "raise_in_rank:1:4", "train", "recipe.yaml"])
    started = time.monotonic()
    assert command.wait(timeout=60) != 0
    assert time.monotonic() - started < 20
    said = (tmp_path / "stderr").read_text()
    assert "error: rank 1 failed first: RuntimeError: made to fail by a test" in said
    assert said.count("failed first") == 1
    assert 'raise RuntimeError("made to fail by a test")' in said  # the traceback
    assert "log: run/logs/rank-1.log" in said
    assert "made to fail by a test" in (tmp_path / "run/logs/rank-1.log").read_text()
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", 1)
    assert "rank 1" in result["error"]
    assert last_step(tmp_path / "run") == 3


def test_a_stopped_run_tells_of_its_last_evaluation(tmp_path: Path, documents: Path, cache: Path) -> None:
    """With save.export: best too: only a finished run exports the best weights."""
    best = {"every": 2, "best": True, "export": "best"}
    write_recipe(tmp_path, documents, train={"max_steps": 200}, eval={"every": 2}, save=best)
    made = "evaluations:2=1.0:4=3.0:6=3.0:8=3.0:10=3.0:12=3.0"
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=[made, "slow_updates:0.2"])
    run.until(lambda: last_step(tmp_path / "run") >= 5, "update 5")
    os.kill(run.processes[0].pid or 0, signal.SIGTERM)
    assert run.wait(60) == 75, run.stderr
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["metrics"]["eval/loss"], result["best"]["step"]) == (3.0, 2)
    assert result["metrics_step"] >= 4
