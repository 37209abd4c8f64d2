"""Calls that run code of a model: their results, and what ends them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ptft_dist.errors import PtftError
from ptft_dist.judging.code_limits import limited


def test_a_call_runs_elsewhere_and_returns_its_result() -> None:
    process, folder, value = limited(lambda x: (os.getpid(), str(Path.cwd()), x + 1), "scoring")(41)
    assert value == 42
    assert process != os.getpid()
    assert Path(folder) != Path.cwd()
    assert not Path(folder).exists()


def test_an_endless_call_is_stopped_with_its_processes(tmp_path: Path) -> None:
    def endless() -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (tmp_path / "pid").write_text(str(child.pid))
        while True:
            time.sleep(0.01)

    with pytest.raises(PtftError, match=r"scoring: stopped after 5 seconds"):
        limited(endless, "scoring", seconds=5)()
    child = int((tmp_path / "pid").read_text())
    until = time.monotonic() + 10
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_memory_and_files_are_limited(tmp_path: Path) -> None:
    limit = 256 * 2**20
    assert limited(lambda: len(bytearray(limit // 4)), "scoring", memory_bytes=limit)() == limit // 4
    with pytest.raises(PtftError, match="scoring: MemoryError"):
        limited(lambda: len(bytearray(2 * limit)), "scoring", memory_bytes=limit)()
    with pytest.raises(PtftError, match="scoring: "):
        limited(lambda: (tmp_path / "large").write_bytes(bytes(32 * 2**20)), "scoring")()


def test_whatever_ends_the_process_is_an_error() -> None:
    with pytest.raises(PtftError, match=r"scoring: its process died \(exit code 3\)"):
        limited(lambda: os._exit(3), "scoring")()
    with pytest.raises(PtftError, match="scoring: SystemExit: 4"):
        limited(lambda: sys.exit(4), "scoring")()
    with pytest.raises(PtftError, match="scoring: ZeroDivisionError"):
        limited(lambda: 1 / 0, "scoring")()
