"""Starts the processes of this machine with `accelerate launch`, and returns the exit code of the run."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ptft_dist.errors import RecipeError
from ptft_dist.launch.environment import EXIT_CODE_FILE, RUN_DIR, START_TOKEN, start_token
from ptft_dist.launch.launch_file import LaunchFile
from ptft_dist.launch.network import gloo_interface
from ptft_dist.launch.result import VERSION_BEFORE, version_of_environment
from ptft_dist.signals import BY_A_LAUNCHER, handle_signals, ignore_stop_signals


def default_launch() -> str:
    """The default launch config: `multi_gpu` if the machine has an NVIDIA GPU, else `cpu`."""
    return "multi_gpu" if Path("/dev/nvidia0").exists() else "cpu"


@dataclass(frozen=True)
class Machines:
    """The machines of a run, and the rank of this machine."""

    count: int
    rank: int
    address: str
    """HOST:PORT of machine 0."""


def machines(count: int | None, rank: int | None, address: str | None) -> Machines | None:
    """The machines from the command-line options; None for one machine. Raises RecipeError for invalid options."""
    if count in (None, 1) and rank in (None, 0) and not address:
        return None
    if count is None or rank is None or not address:
        raise RecipeError("several machines need all of --machines, --machine-rank and --address HOST:PORT")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise RecipeError(f"--address: {address!r}; expected HOST:PORT")
    if rank >= count:
        raise RecipeError(f"--machine-rank: {rank}; with --machines {count} it must be from 0 to {count - 1}")
    return Machines(count, rank, address)


def local_processes(file: LaunchFile, processes: int | None, several: Machines | None) -> int:
    """The number of processes that this machine starts.

    Args:
        processes: total over all machines; None: num_processes of the launch config.

    Raises:
        RecipeError: the number is not given, cannot be divided over the machines, or does not fit the launch config.
    """
    total, count = processes or file.processes, several.count if several else 1
    if total is None:
        raise RecipeError(f"{file.path}: no num_processes; give --processes N, over all machines")
    if file.distributed_type == "NO" and total * count > 1:
        raise RecipeError(
            f"--processes: {total}: {file.path} has distributed_type NO, which starts one process; "
            "use a launch config such as multi_gpu"
        )
    if several is None and processes is None and file.machines > 1:
        raise RecipeError(
            f"{file.path} is for {file.machines} machines: give --machines, --machine-rank and --address HOST:PORT, "
            "or --processes N for N processes on this machine alone"
        )
    if total % count:
        raise RecipeError(f"--processes: {total} cannot be divided over {count} machines; use a multiple of {count}")
    return total // count


def command(file: LaunchFile, processes: int | None, several: Machines | None, arguments: Sequence[str]) -> list[str]:
    """The `accelerate launch` command line that runs `ptft` with `arguments` on every rank of this machine.

    Raises RecipeError if the launch config would start other machines over ssh or MPI.
    """
    if file.distributed_type != "NO":
        # Accelerate then uses torchrun, which reads $$ as an escaped $ and replaces ${local_rank}.
        arguments = [word.replace("$", "$$") for word in arguments]
    words = ["accelerate", "launch", "--config_file", str(file.path)]
    if processes is not None:
        words += ["--num_processes", str(processes)]
    if file.deepspeed_json is not None:  # a relative name would start at the ranks' current directory
        words += ["--deepspeed_config_file", str(file.deepspeed_json)]
    if file.distributed_type == "DEEPSPEED":
        words += _deepspeed_launcher(file, several)
    if several is None:
        words += ["--num_machines", "1", "--machine_rank", "0"]
        words += ["--main_process_port", "0"]  # any free port, so that two runs do not use the same one
    else:
        host, _, port = several.address.rpartition(":")
        words += ["--num_machines", str(several.count), "--machine_rank", str(several.rank)]
        words += ["--main_process_ip", host, "--main_process_port", port]
    return [*words, "-m", "ptft_dist", *arguments]


def _deepspeed_launcher(file: LaunchFile, several: Machines | None) -> list[str]:
    """The option that selects torchrun. Accelerate's default, pdsh, writes environment variables to a file."""
    if several is not None and file.deepspeed_launcher not in (None, "standard"):
        raise RecipeError(
            f"{file.path}: deepspeed_multinode_launcher: {file.deepspeed_launcher}: not supported, because it starts "
            "the other machines itself and writes environment variables, including secrets, to a file; set it to "
            "standard, and run this command on each machine"
        )
    return ["--deepspeed_multinode_launcher", "standard"]


def launch(
    words: Sequence[str], run_dir: Path, threads: int, variables: Mapping[str, str], address: str | None = None
) -> int:
    """Run the command, and return the exit code of the run, which `accelerate launch` does not pass on.

    A signal creates the run directory's stop file, because torchrun would kill the ranks seconds after a signal, during
    a save. A second SIGINT kills the ranks at once. Other signals are ignored after this function returns, so that a
    late one does not change the exit code.

    Args:
        threads: CPU threads of each rank, unless OMP_NUM_THREADS is set.
        variables: environment variables for the ranks, see LaunchFile.variables.
        address: that of machine 0, if there are several.
    """
    print("+ " + shlex.join(words), file=sys.stderr, flush=True)
    stop_file, token = run_dir / "stop", start_token(os.environ, address)
    run_dir.mkdir(parents=True, exist_ok=True)
    if address is None:  # on several machines it may be of another launcher of this start
        _forget_stop(stop_file)
    child: subprocess.Popen[bytes] | None = None
    signals = 0

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            try:
                stop_file.write_text(token)
            except OSError:  # such as a full quota; ranks that train handle the signal themselves, and tell the others
                if child is not None:
                    os.killpg(child.pid, signal.SIGTERM)
        elif number == signal.SIGINT and child is not None:
            os.killpg(child.pid, signal.SIGKILL)

    previous = handle_signals(on_signal)
    python = [sys.executable, "-m", "ptft_dist.launch.accelerate_launch", *words[2:]]
    environment = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",  # seconds that torchrun waits after a rank has died
        "PET_SIGNALS_TO_HANDLE": "SIGQUIT",  # the only signal that torchrun itself handles
        **_environment(threads, variables),
    }
    descriptor, name = tempfile.mkstemp(prefix="ptft-exit-code-")
    os.close(descriptor)
    environment |= {EXIT_CODE_FILE: name, START_TOKEN: token, RUN_DIR: str(run_dir.absolute())}
    environment |= {VERSION_BEFORE: version_of_environment(run_dir)}
    if address is not None:
        interface, message = gloo_interface(address, environment)
        environment |= interface
        if message is not None:
            print(message, file=sys.stderr, flush=True)
    try:
        # A new session, so that the ranks do not get a terminal's Ctrl-C. Slurm may still signal each process of a job.
        # torchrun ignores these signals, and so does a rank until it installs its own handler.
        child = subprocess.Popen(python, start_new_session=True, preexec_fn=ignore_stop_signals, env=environment)
        code = child.wait()
    finally:
        ignore_stop_signals()
        signal.signal(signal.SIGINT, previous[signal.SIGINT])
        if signals:  # the run may have stopped by a signal of another machine before, and left this stop file
            stop_file.unlink(missing_ok=True)
        reported = Path(name).read_text()
        Path(name).unlink(missing_ok=True)
    return own_exit_code(code, reported)


def _forget_stop(stop_file: Path) -> None:
    """Remove the stop file of a launcher that was killed before it could do so. All starts in an interactive Slurm job
    have the same token, so it would stop this one."""
    with contextlib.suppress(OSError):
        if stop_file.read_text(encoding="utf-8", errors="replace").startswith(BY_A_LAUNCHER):
            stop_file.unlink()


def run_ranks(words: Sequence[str], threads: int, variables: Mapping[str, str]) -> int:
    """Run a command that has nothing to save at a signal, which ends its ranks; return its exit code.

    Arguments as of `launch`.
    """
    print("+ " + shlex.join(words), file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="ptft-") as folder:
        reported = Path(folder) / "exit_code"
        reported.touch()
        environment = {
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",
            **_environment(threads, variables),
            EXIT_CODE_FILE: str(reported),
            START_TOKEN: start_token(os.environ, None),
        }
        python = [sys.executable, "-m", "ptft_dist.launch.accelerate_launch", *words[2:]]
        child = subprocess.Popen(python, start_new_session=True, env=environment)

        def on_signal(number: int, _frame: FrameType | None) -> None:
            os.killpg(child.pid, signal.SIGTERM if number == signal.SIGINT else number)

        previous = handle_signals(on_signal)
        try:
            code = child.wait()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        return own_exit_code(code, reported.read_text())


def become_rank(words: Sequence[str], threads: int, variables: Mapping[str, str], address: str | None) -> NoReturn:
    """Replace this process, a task of srun, by a rank of the run; see srun_rank.py. Arguments as of `launch`."""
    address = address or f"127.0.0.1:{free_port(os.environ)}"
    host, _, port = address.rpartition(":")
    environment = _environment(threads, variables) | {"MASTER_ADDR": host, "MASTER_PORT": port}
    environment[START_TOKEN] = start_token(os.environ, address)
    python = [sys.executable, "-m", "ptft_dist.launch.srun_rank", *words[2:]]
    os.execve(sys.executable, python, environment)


def free_port(environ: Mapping[str, str]) -> int:
    """A port that all tasks of a Slurm job on one node choose, and other jobs do not: as in slurm/job.sbatch.j2."""
    restarts = int(environ.get("SLURM_RESTART_COUNT") or 0)
    return 20000 + (int(environ["SLURM_JOB_ID"]) + 3331 * restarts) % 10000


def _environment(threads: int, variables: Mapping[str, str]) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), **os.environ, **variables}


def own_exit_code(code: int, reported: str) -> int:
    """The exit code that a rank of this machine reported, or else that of the launcher. Not 0 if the launcher failed.

    Args:
        code: exit code of `accelerate launch`.
        reported: contents of the file EXIT_CODE_FILE; empty if the ranks died before they could write it.
    """
    if code == 0:
        return 0
    return (int(reported) if reported.isdigit() else code if code > 0 else 1) or 1
