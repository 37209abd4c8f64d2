"""Processes a stream of chunks in several threads or processes; results are returned in the order of the chunks.

Worker processes are forked, so they share the encoder, its tokenizer and all imported libraries. A new interpreter
would take seconds for imports, and would run the user's script again. A worker uses neither the accelerator nor files
of its parent. It ends when its parent ends, because its socket is then closed.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import sys
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Any, NoReturn, TypeVar

from ptft_dist.errors import PtftError, RecipeError
from ptft_dist.signals import STOP

T = TypeVar("T")
R = TypeVar("R")

WORKERS_VARIABLE = "PTFT_ENCODE_WORKERS"
_TOKENIZER_THREADS = "TOKENIZERS_PARALLELISM"
_AHEAD = 2  # waiting chunks per worker, to limit memory
_SMALL = 2  # number of chunks that are processed before any process is started


def worker_count() -> int:
    """The number of encoding processes: the environment variable PTFT_ENCODE_WORKERS, otherwise one per core.

    Raises:
        RecipeError: the variable is not a positive number.
    """
    given = os.environ.get(WORKERS_VARIABLE)
    if given is not None:
        if not (given.isascii() and given.isdigit() and int(given) > 0):
            raise RecipeError(f"{WORKERS_VARIABLE}: {given!r} is not a number of processes. Set it to 1 or more.")
        return int(given)
    if sys.platform != "linux":
        return 1  # system libraries of other platforms do not support a fork
    return len(os.sched_getaffinity(0))


def in_threads(chunks: Iterable[T], work: Callable[[T], R]) -> Generator[tuple[T, R], None, None]:
    """Process chunks in threads, two chunks ahead of the caller. For work that releases the GIL, such as tokenizers."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        yield from _in_order(chunks, work, pool, _AHEAD)


def in_processes(chunks: Iterable[T], work: Callable[[T], R], workers: int) -> Generator[tuple[T, R], None, None]:
    """Process chunks in forked processes. For Python code.

    Short streams are processed in this process, and all streams if workers is 1.

    Raises:
        PtftError: a worker process was killed.
        Exception: an exception of `work`, raised in place of its chunk's result.
    """
    chunks = iter(chunks)
    if workers == 1:
        yield from ((chunk, work(chunk)) for chunk in chunks)
        return
    for chunk in islice(chunks, _SMALL):
        yield chunk, work(chunk)
    first = next(chunks, None)
    if first is None:
        return
    with _forked(work, workers) as pairs, ThreadPoolExecutor(workers) as pool:
        idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in pairs:
            idle.put(worker)

        def remote(chunk: T) -> R:
            worker = idle.get()
            try:
                result: R = worker.ask(chunk)
            finally:
                idle.put(worker)
            return result

        yield from _in_order(chain([first], chunks), remote, pool, _AHEAD * workers)


def _in_order(
    chunks: Iterable[T], work: Callable[[T], R], pool: ThreadPoolExecutor, ahead: int
) -> Generator[tuple[T, R], None, None]:
    waiting: deque[tuple[T, Future[R]]] = deque()
    try:
        for chunk in chunks:
            waiting.append((chunk, pool.submit(work, chunk)))
            if len(waiting) > ahead:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:  # after an error, the remaining results are not needed
        for _, future in waiting:
            future.cancel()


class _Worker:
    """The parent's handle of one forked process."""

    def __init__(self, pid: int, connection: Connection) -> None:
        self.pid, self.connection = pid, connection

    def ask(self, chunk: Any) -> Any:
        try:
            self.connection.send(chunk)
            good, result = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise PtftError(
                f"data: an encoding process (process id {self.pid}) was killed, perhaps for lack of memory. Set "
                f"{WORKERS_VARIABLE} to a smaller number than {worker_count()}, or give this job more memory."
            ) from error
        if not good:
            raise result
        return result

    def end(self) -> None:
        self.connection.close()
        os.waitpid(self.pid, 0)


@contextmanager
def _forked(work: Callable[[Any], Any], count: int) -> Iterator[list[_Worker]]:
    workers: list[_Worker] = []
    try:
        with variable(_TOKENIZER_THREADS, "false"):  # threads do not survive a fork
            for _ in range(count):
                workers.append(_fork(work, workers))
        yield workers
    finally:
        for worker in workers:
            worker.end()


def _fork(work: Callable[[Any], Any], others: list[_Worker]) -> _Worker:
    parent_end, child_end = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        parent_end.close()
        for other in others:  # otherwise the parent's ends of their sockets would stay open in this process
            other.connection.close()
        _serve(work, Connection(child_end.detach()))
    child_end.close()
    return _Worker(pid, Connection(parent_end.detach()))


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _serve(work: Callable[[Any], Any], connection: Connection) -> NoReturn:
    """The loop of a worker: process chunks until the parent closes the socket."""
    for signal_number in (signal.SIGINT, *STOP):  # sent to the whole process group; the parent handles them
        signal.signal(signal_number, signal.SIG_IGN)
    code = 1
    try:
        while True:
            connection.send(_answer(work, connection.recv()))
    except (EOFError, ConnectionError):
        code = 0  # the parent has finished or died
    finally:
        os._exit(code)  # do not flush the parent's open files


def _answer(work: Callable[[Any], Any], chunk: Any) -> tuple[bool, Any]:
    """(True, result) or (False, exception); both can be pickled."""
    try:
        return True, work(chunk)
    except PtftError as error:
        return False, error
    except Exception as error:  # goes to the parent, which raises it
        error.add_note(f"In an encoding process:\n{traceback.format_exc()}")
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # the exception cannot be pickled
            return False, RuntimeError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        return False, error
