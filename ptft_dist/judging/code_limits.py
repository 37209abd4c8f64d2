"""Calls that run code of a model: each in a process of its own, with limits of time and memory. This is no sandbox."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from ptft_dist.errors import PtftError

SECONDS = 60.0
"""Of one call, the end of its processes included."""
MEMORY_BYTES = 4 * 2**30
"""Of one call, beyond what this process has when it starts."""
FILE_BYTES = 16 * 2**20


def limited(
    call: Callable[..., Any], name: str, *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES
) -> Callable[..., Any]:
    """A function that forks, makes the call in the child, in an empty temporary directory, and returns its result.

    Raises PtftError if the call raises an error or exceeds a limit. name: of the call, for the message.
    """

    def run(*arguments: Any, **named: Any) -> Any:
        # A fork, because the call needs objects that cannot be pickled, such as functions of a task file.
        context = multiprocessing.get_context("fork")
        receiver, sender = context.Pipe(duplex=False)
        with tempfile.TemporaryDirectory(prefix="ptft-code-") as folder:
            process = context.Process(
                target=_child, args=(sender, folder, memory_bytes, seconds, call, arguments, named)
            )
            process.start()
            sender.close()
            try:
                if not receiver.poll(seconds):
                    raise PtftError(f"{name}: stopped after {seconds:g} seconds. Give the task its own limit of time")
                problem, value = receiver.recv()
            except EOFError:
                process.join()
                raise PtftError(f"{name}: its process died (exit code {process.exitcode})") from None
            finally:
                assert process.pid is not None
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
        if problem is not None:
            raise PtftError(f"{name}: {problem}")
        return value

    return run


def _child(
    sender: Connection,
    folder: str,
    memory_bytes: int,
    seconds: float,
    call: Callable[..., Any],
    arguments: Any,
    named: Any,
) -> None:
    os.setsid()  # so that processes that the code starts end with it
    os.chdir(folder)
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        pages = int(file.read().split()[0])
    _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + memory_bytes)
    _limit(resource.RLIMIT_CPU, int(seconds) + 1)
    _limit(resource.RLIMIT_FSIZE, FILE_BYTES)
    _limit(resource.RLIMIT_CORE, 0)
    result: tuple[str | None, Any]
    try:
        result = (None, call(*arguments, **named))
    except BaseException as error:  # also SystemExit and MemoryError, raised by the code of a model
        result = (f"{type(error).__name__}: {error}", None)
    sender.send(result)
    sender.close()


def _limit(kind: int, wanted: int) -> None:
    _, most = resource.getrlimit(kind)
    value = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(kind, (value, value))
