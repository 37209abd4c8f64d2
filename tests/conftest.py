"""Documents and one cache for all tests of whole runs, so that data are prepared once; and what runs side by side.

Under pytest-xdist each worker has its own cache, documents and fork server. Ports are free ones that the kernel chose.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import kill_leftovers, share_fork_server, write_documents

from ptft_dist.config import secrets
from ptft_dist.reporting.messages import hide_messages
from ptft_dist.signals import STOP

gc.disable()  # until all tests are collected: nothing of what their modules import is garbage

# Also for all processes that tests start. gloo's thread spins while another thread holds its lock, and in a batch, one
# that wakes another process keeps its core until it has released the lock. Halves the system time of two ranks.
if hasattr(os, "SCHED_BATCH"):
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

# Begun first, so that no process is left with them alone. Tests of Slurm mostly wait, in one of the three processes.
# Meanwhile the two others need tests that do not: those of `distributed` do, for each other's ranks.
LONG = (
    "tests/slurm/",
    "tests/test_training.py::test_a_compiled_network",
    "tests/test_new_tokens.py::test_smollm2",
    "tests/test_real_models.py",
    "tests/test_docs_commands.py",
    "tests/test_recipes.py",
    "tests/test_launch.py",
    "tests/immunity/",
    "tests/test_sweep.py",
    "tests/test_gpu_dry.py",
    "tests/distributed/",
    "tests/test_srun_rank.py",
    "tests/test_trackers.py",
    "tests/test_prefetch.py",
    "tests/test_verbs_of_runs.py",
    "tests/test_pipeline.py",
    "tests/test_harness.py",
    "tests/test_critic.py",
    "tests/test_tokenizer_extension.py::test_two_processes",
    "tests/test_generation.py::test_every_row",
    "tests/test_training.py",
    "tests/test_token_classification.py",
    "tests/test_vllm.py",
    "tests/test_wheel.py",
)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", 0) and not hasattr(config, "workerinput"):
        share_fork_server()


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: [item.nodeid.startswith(place) for place in LONG], reverse=True)
    for item in items:
        group = xdist_group(item) if isinstance(item, pytest.Function) else None
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def xdist_group(item: pytest.Function) -> str | None:
    """Tests of a group run in one worker, in order: those that share a module's fixture, so that it is made once, and
    those of the Slurm cluster, since two clusters would compete for the cores."""
    if {"cluster", "three"} & set(item.fixturenames):
        return "slurm"
    definitions = item._fixtureinfo.name2fixturedefs
    shared = any(definitions[name][-1].scope == "module" for name in item.fixturenames if name in definitions)
    return item.nodeid.split("::")[0] if shared else None


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """160 documents of different lengths, one per line."""
    return write_documents(tmp_path_factory.mktemp("documents") / "text.txt")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The value of PTFT_CACHE for every run that `support.start` starts."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """What a test leaves to later ones is undone: processes that it started, what happens at a signal (which also the
    processes of later tests inherit), messages that a command shows until the process ends, and secrets."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *STOP)}
    yield
    kill_leftovers()
    for number, handler in before.items():
        signal.signal(number, handler)
    hide_messages()
    secrets.forget()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)]
    try:
        made = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no disk of a known size can be mounted: {error}")
    if made.returncode:
        pytest.skip(f"no disk of a known size can be mounted: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)
