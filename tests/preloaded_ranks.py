"""Ranks that a real launcher starts, without their imports, which are most of what such a start costs.

torchrun starts its ranks with the executable in PYTHON_EXEC. `preloaded()` gives the environment in which that is
rank_client.py: a small process that asks a server, which has imported everything, to fork the rank, and that lives and
ends as the rank does. Tests whose point is the whole start of a rank leave PYTHON_EXEC alone.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from support import ROOT, as_started_by_a_user, fork_server


@functools.cache
def preloaded() -> dict[str, str]:
    """Environment variables for a launcher."""
    folder = Path(tempfile.mkdtemp(prefix="ptft-ranks-"))
    atexit.register(shutil.rmtree, folder)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(folder / "socket"))
    listener.listen(16)
    fork_server().Process(target=serve, args=(listener,), daemon=True).start()
    listener.close()
    python = folder / "python"
    client = shlex.join([sys.executable, "-SsE", str(ROOT / "tests/rank_client.py"), str(folder / "socket")])
    python.write_text(f'#!/bin/sh\nexec {client} "$@"\n')
    python.chmod(0o700)
    return {"PYTHON_EXEC": str(python)}


def serve(listener: socket.socket) -> None:
    """Fork a rank for each client, until the tests end."""
    events = selectors.DefaultSelector()
    events.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in events.select():
            if key.fileobj is listener:
                client = listener.accept()[0]
                pid = fork_rank(client, listener)
                ended = os.pidfd_open(pid)
                events.register(client, selectors.EVENT_READ, pid)
                events.register(ended, selectors.EVENT_READ, (pid, client))
            elif isinstance(key.fileobj, socket.socket):  # a signal; nothing if the client was killed
                signals = key.fileobj.recv(1)
                os.kill(key.data, signals[0] if signals else signal.SIGKILL)
                if not signals:
                    events.unregister(key.fileobj)
            else:
                pid, client = key.data
                events.unregister(key.fileobj)
                os.close(key.fd)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                if client in events.get_map():
                    with contextlib.suppress(BrokenPipeError):  # killed in this moment
                        client.send(str(code).encode())
                    events.unregister(client)
                client.close()


def fork_rank(client: socket.socket, listener: socket.socket) -> int:
    """The id of a process that is the rank of this client."""
    _, files, _, _ = socket.recv_fds(client, 16, 4)
    if pid := os.fork():
        for file in files:
            os.close(file)
        return pid
    code: Any = 1
    try:
        with os.fdopen(files[0]) as file:
            file.seek(0)
            request = json.load(file)
        for stream, number in zip(files[1:], range(3), strict=True):
            os.dup2(stream, number)
            os.close(stream)
        client.close()
        listener.close()
        become_rank(request)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def become_rank(request: dict[str, Any]) -> None:
    """Run the module or the script of the client, in its directory and its environment."""
    os.setsid()
    as_started_by_a_user()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    os.getppid = lambda: int(request["parent"])  # type: ignore[assignment]
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    import torch

    torch.set_num_threads(1)
    if request["words"][0] == "-m":
        sys.argv = request["words"][1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = request["words"]
        runpy.run_path(sys.argv[0], run_name="__main__")
