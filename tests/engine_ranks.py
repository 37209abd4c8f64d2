"""Runs a function on several ranks in separate processes, for tests of the engine without a whole run."""

from __future__ import annotations

import functools
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import STARTED, Start, as_started_by_a_user, environment, fork_server, free_port, rank_variables


def on_ranks(function: Callable[..., Any], *arguments: Any, folder: Path, ranks: int = 2, kind: str = "cpu") -> Any:
    """What function(*arguments) returns on each rank, by rank. An error on any rank is an error here.

    kind: as in support.start. The function must be importable; it runs in `folder`.
    """
    run = start_ranks(function, *arguments, folder=folder, ranks=ranks, kind=kind)
    assert run.wait(timeout_s=90) == 0, run.stderr
    return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(ranks)]


def start_ranks(
    function: Callable[..., Any], *arguments: Any, folder: Path, ranks: int = 2, kind: str = "cpu"
) -> Start:
    """Like on_ranks, without waiting."""
    port, processes = free_port(), []
    for rank in range(ranks):
        variables = environment() | (rank_variables(rank, ranks, port, kind) if ranks > 1 or kind != "cpu" else {})
        body = functools.partial(function, *arguments)
        process = fork_server().Process(target=_rank, args=(body, variables, str(folder), rank))
        process.start()
        processes.append(process)
    STARTED.append(Start(processes, folder / "rank"))
    return STARTED[-1]


def _rank(body: Callable[[], Any], variables: dict[str, str], folder: str, rank: int) -> None:
    as_started_by_a_user()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for ending, number in ((".out", 1), (".err", 2)):
        os.dup2(os.open(f"rank-{rank}{ending}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    import torch

    torch.set_num_threads(1)
    try:
        Path(f"result-{rank}").write_bytes(pickle.dumps(body()))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
