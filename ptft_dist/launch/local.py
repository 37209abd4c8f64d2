"""Start several processes on this machine through stock `accelerate launch`, and bring back one exit code."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ptft_dist.config.shipped import find_shipped
from ptft_dist.errors import RecipeError
from ptft_dist.launch.deepspeed_config import read_deepspeed_config


def default_launch() -> str:
    """`multi_gpu` where the machine has an NVIDIA device, else `cpu`."""
    return "multi_gpu" if Path("/dev/nvidia0").exists() else "cpu"


def launch_config(name: str) -> tuple[Path, Path | None]:
    """A launch config by name or path, and the DeepSpeed JSON it names. Raises RecipeError if either is wrong."""
    path = find_shipped("launch_configs", name, ".yaml")
    try:
        config = YAML(typ="safe").load(path)
    except (OSError, YAMLError) as error:
        raise RecipeError(f"{path}: the launch config cannot be read: {error}") from None
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise RecipeError(f"{path}: this is no accelerate config: it has no distributed_type")
    if config["distributed_type"] != "DEEPSPEED":
        return path, None
    named = (config.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if not named:
        raise RecipeError(f"{path}: deepspeed_config.deepspeed_config_file is missing; see launch_configs/zero2.yaml")
    # Accelerate looks from the current directory; the shipped configs mean the folder beside theirs.
    beside = path.parent.parent / named
    deepspeed = Path(named) if Path(named).is_file() else beside if beside.is_file() else None
    if deepspeed is None:
        deepspeed = find_shipped("ds_configs", Path(named).stem, ".json")
    read_deepspeed_config(deepspeed)
    return path, deepspeed.resolve()


@dataclass(frozen=True)
class Machines:
    """Which of several machines this one is; address is HOST:PORT of machine 0, the same on all."""

    count: int
    rank: int
    address: str


def machines(count: int | None, rank: int | None, address: str | None) -> Machines | None:
    """From the command line's options; None for one machine. Raises RecipeError if they do not fit together."""
    if count in (None, 1) and rank in (None, 0) and not address:
        return None
    if count is None or rank is None or not address:
        raise RecipeError("several machines need all of --machines, --machine-rank and --address HOST:PORT")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise RecipeError(f"--address: {address!r} is not HOST:PORT")
    if rank >= count:
        raise RecipeError(f"--machine-rank: {rank}; with --machines {count} it goes from 0 to {count - 1}")
    return Machines(count, rank, address)


def local_processes(launch: str, processes: int | None, several: Machines | None) -> int:
    """How many of the run's processes this machine gets. Raises RecipeError if they do not divide."""
    config = YAML(typ="safe").load(launch_config(launch)[0])
    total, count = processes or config.get("num_processes", 1), several.count if several else 1
    if total % count:
        raise RecipeError(f"--processes: {total} cannot be divided over {count} machines")
    return total // count


def command(launch: str, processes: int | None, several: Machines | None, arguments: Sequence[str]) -> list[str]:
    """The `accelerate launch` command line that runs `ptft` with `arguments` on every rank."""
    path, deepspeed = launch_config(launch)
    kind = str(YAML(typ="safe").load(path)["distributed_type"])
    if kind not in ("NO", "MULTI_CPU"):
        # Accelerate then goes through torchrun, which reads $$ as an escaped $ and fills in ${local_rank}.
        arguments = [word.replace("$", "$$") for word in arguments]
    words = ["accelerate", "launch", "--config_file", str(path)]
    if processes is not None:
        words += ["--num_processes", str(processes)]
    if deepspeed is not None:
        words += ["--deepspeed_config_file", str(deepspeed)]
    if several is None:
        words += ["--num_machines", "1", "--machine_rank", "0"]
        words += ["--main_process_port", "0"]  # any free one, so that two runs do not meet
    else:
        host, _, port = several.address.rpartition(":")
        words += ["--num_machines", str(several.count), "--machine_rank", str(several.rank)]
        words += ["--main_process_ip", host, "--main_process_port", port]
    return [*words, "-m", "ptft_dist", *arguments]


def launch(words: Sequence[str], run_dir: Path, threads: int) -> int:
    """Run the command and return the run's own exit code, which `accelerate launch` does not pass on.

    threads: what each rank computes with on the CPU, unless OMP_NUM_THREADS is set.

    SIGTERM and SIGINT become the run directory's stop file: torchrun would kill the ranks seconds after a signal, in
    the middle of a save. A second SIGINT ends the ranks at once. When this returns, SIGTERM stays ignored: one that
    comes in the moment before the exit must not change the exit code.
    """
    print("+ " + shlex.join(words), file=sys.stderr, flush=True)
    started = time.time()
    stop_file = run_dir / "stop"
    run_dir.mkdir(parents=True, exist_ok=True)
    child: subprocess.Popen[bytes] | None = None
    asked = 0

    def on_signal(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            stop_file.touch()
        elif number == signal.SIGINT and child is not None:
            os.killpg(child.pid, signal.SIGKILL)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    python = [sys.executable, "-m", "accelerate.commands.launch", *words[2:]]
    environment = {
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5",  # torchrun's own wait after a death
        "PET_SIGNALS_TO_HANDLE": "SIGQUIT",  # of torchrun itself
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
    }
    try:
        # A session of their own keeps a terminal's Ctrl-C from the ranks. Slurm may still signal each process of a job:
        # torchrun ignores SIGTERM, and so does a rank until it listens itself.
        child = subprocess.Popen(python, start_new_session=True, preexec_fn=ignore_sigterm, env=environment)
        code = child.wait()
    finally:
        ignore_sigterm()
        signal.signal(signal.SIGINT, previous[signal.SIGINT])
        if asked:  # on another machine the run may have stopped before this one was asked to
            stop_file.unlink(missing_ok=True)
    return own_exit_code(code, run_dir / "result.json", started)


def ignore_sigterm() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def own_exit_code(code: int, result: Path, started: float) -> int:
    """What the ranks said in result.json, if they wrote it after `started`; else the launcher's own code, never 0."""
    if code == 0:
        return 0
    try:
        if result.stat().st_mtime >= started - 1:
            return int(json.loads(result.read_text())["exit_code"]) or 1
    except (OSError, ValueError, KeyError, TypeError):
        pass  # the ranks died before they could say anything
    return code if code > 0 else 1
