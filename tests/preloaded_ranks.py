"""`ptft`, and ranks that a real launcher starts, without their imports, which are most of what such a start costs.

torchrun starts its ranks with the executable in PYTHON_EXEC. `preloaded()` gives the environment in which that is
rank_client.py: a small process that asks a server, which has imported everything, to fork the rank, and that lives and
ends as the rank does. `preloaded_ptft()` is a directory with a `ptft` of this kind; what it starts with sys.executable
is of this kind too. Tests whose point is the whole start leave both alone.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import json
import multiprocessing.util
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from rank_client import PASSED_ON
from support import ROOT, as_started_by_a_user, fork_server, ptft

PYTHON = sys.executable
NAMESPACES = ("net", "uts", "mnt")  # the last, because its files are what the others are read from


def preloaded() -> dict[str, str]:
    """Environment variables for a launcher."""
    return {"PYTHON_EXEC": str(preloaded_ptft() / "python")}


@functools.cache
def preloaded_ptft() -> Path:
    """A directory for the PATH, with `ptft` and a `python` that runs modules and scripts."""
    folder = Path(tempfile.mkdtemp(prefix="ptft-ranks-"))
    atexit.register(shutil.rmtree, folder)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(folder / "socket"))
    listener.listen(16)
    fork_server().Process(target=serve, args=(listener, str(folder / "python")), daemon=True).start()
    listener.close()
    client = shlex.join([PYTHON, "-SsE", str(ROOT / "tests/rank_client.py"), str(folder / "socket")])
    for name, words in (("python", ""), ("ptft", " -m ptft_dist")):
        (folder / name).write_text(f'#!/bin/sh\nexec {client}{words} "$@"\n')
        (folder / name).chmod(0o700)
    return folder


def forked_ptft(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`support.ptft` by `preloaded_ptft`: the command line, and all that it launches, without their imports."""
    return ptft(*args, command=[str(preloaded_ptft() / "ptft")], **options)


def serve(listener: socket.socket, executable: str) -> None:
    """Fork a rank for each client, until the tests end or are killed."""
    tests, events = multiprocessing.parent_process(), selectors.DefaultSelector()
    assert tests is not None
    events.register(listener, selectors.EVENT_READ)
    events.register(tests.sentinel, selectors.EVENT_READ)
    forks: dict[int, int] = {}  # the client's process -> the rank
    while True:
        for key, _ in events.select():
            if key.fileobj is listener:
                client = listener.accept()[0]
                rank = fork_rank(client, listener, executable, forks)
                if rank is None:
                    client.close()
                    continue
                events.register(client, selectors.EVENT_READ, rank)
                events.register(os.pidfd_open(rank.pid), selectors.EVENT_READ, (rank, client))
            elif isinstance(key.fileobj, socket.socket):
                if key.fileobj.fileno() < 0:  # the rank has just ended
                    continue
                rank, signals = key.data, key.fileobj.recv(1)
                rank.send(signals[0] if signals else signal.SIGKILL, forks)  # nothing comes of a client that was killed
                if not signals:
                    events.unregister(key.fileobj)
            elif key.fileobj == tests.sentinel:
                for pid in forks.values():
                    os.kill(pid, signal.SIGKILL)
                return
            else:
                rank, client = key.data
                events.unregister(key.fileobj)
                os.close(key.fd)
                forks.pop(rank.client, None)
                code = os.waitstatus_to_exitcode(os.waitpid(rank.pid, 0)[1])
                if client in events.get_map():
                    with contextlib.suppress(BrokenPipeError):  # killed in this moment
                        client.send(str(code).encode())
                    events.unregister(client)
                client.close()


class Rank(NamedTuple):
    pid: int
    client: int
    task: bool
    """Whether Slurm has started its client, which is all that Slurm finds of the processes that its signals are for."""

    def send(self, number: int, forks: Mapping[int, int]) -> None:
        """Send a signal to the rank, or as Slurm to each process. Clients would pass on what their ranks get anyway."""
        family = descendants(self.pid, forks) if self.task else [self.pid]
        for pid in family:
            if number == signal.SIGKILL or pid not in forks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)


def descendants(pid: int, forks: Mapping[int, int]) -> list[int]:
    """A process, and those that it and its children have started, also through clients."""
    found = [pid]
    for each in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            found += [child.pid for child in psutil.Process(each).children()]
        if each in forks:
            found.append(forks[each])
    return found


def fork_rank(client: socket.socket, listener: socket.socket, executable: str, forks: dict[int, int]) -> Rank | None:
    """Fork the rank of this client, and add it to `forks`; None for a client that was killed before."""
    _, files, _, _ = socket.recv_fds(client, 16, 4)
    if not files:
        return None
    with os.fdopen(files[0]) as file:
        file.seek(0)
        request = json.load(file)
    own = request["parent"] in forks.values() or request["parent"] == os.getpid()  # the latter after exec by a rank
    task = "SLURM_PROCID" in request["env"] and not own
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # until the rank ignores what its client ignored
    if pid := os.fork():
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for stream in files[1:]:
            os.close(stream)
        forks[request["pid"]] = pid
        return Rank(pid, request["pid"], task)
    code: Any = 1
    try:
        for stream, number in zip(files[1:], range(3), strict=True):
            os.dup2(stream, number)
            os.close(stream)
        for number in request["ignored"]:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        enter_host(request["pid"])
        client.close()
        listener.close()
        become_rank(request, executable)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        multiprocessing.util._exit_function()
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def enter_host(pid: int) -> None:
    """Enter the network, the names and the mounts of a process, if it is on a host of its own: see slurm/hosts.py."""
    for name in NAMESPACES:
        own, other = Path(f"/proc/self/ns/{name}"), Path(f"/proc/{pid}/ns/{name}")
        if own.readlink() != other.readlink():
            with other.open() as file:
                if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
                    raise OSError(ctypes.get_errno(), f"setns: {name}")


def become_rank(request: dict[str, Any], executable: str) -> None:
    """Run the module or the script of the client, in its directory and its environment. executable: for children."""
    os.setsid()
    as_started_by_a_user()
    multiprocessing.current_process().daemon = False
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    rank, parent, real = os.getpid(), int(request["parent"]), os.getppid
    os.getppid = lambda: parent if os.getpid() == rank else real()  # type: ignore[assignment]  # data workers ask too
    sys.stdin = os.fdopen(0)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    import torch

    from ptft_dist.runs import local

    torch.set_num_threads(1)
    words = request["words"]
    if words[0].startswith("-") and words[0] != "-m":
        os.execv(PYTHON, [PYTHON, *words])
    sys.executable = executable
    local.COMMAND = (executable, *local.COMMAND[1:])
    customize(request["env"].get("PYTHONPATH"))
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(sys.argv[0], run_name="__main__")


def customize(path: str | None) -> None:
    """What an interpreter does with PYTHONPATH."""
    folders = path.split(os.pathsep) if path else []
    sys.path[:0] = folders
    spec = PathFinder.find_spec("sitecustomize", folders)
    if spec is not None and spec.origin is not None:
        runpy.run_path(spec.origin)
