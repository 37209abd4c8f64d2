"""Failures are sorted: memory, disk, a faulty GPU, a lost machine or network, and the rest. The first one counts."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from support import free_port, start, write_recipe

from ptft_dist.checkpoint.checkpoint import SaveError
from ptft_dist.data.cache import writing
from ptft_dist.errors import (
    EXIT_DISK,
    EXIT_FAILED,
    EXIT_LOST,
    EXIT_MEMORY,
    CheckpointError,
    PtftError,
    RecipeError,
    ShardWriteError,
    exit_code_of,
    is_hardware_fault,
)
from ptft_dist.launch.environment import Place
from ptft_dist.reporting.messages import messages
from ptft_dist.reporting.run_files import FailureReport, make_run_dir

IN_NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version 2.27.5\n{}"
REMOTE = IN_NCCL.format(
    "remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
)
SYSTEM = IN_NCCL.format(
    "unhandled system error (run with NCCL_DEBUG=INFO for details)",
    "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error. ",
)
CUDA = IN_NCCL.format(
    "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure {}",
)
GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.77.0.2]:1"
CUT_OFF = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [10.77.0.2]:1: Connection timed out",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Read error [10.77.0.2]:1: No route to host",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1000ms for recv operation",
)


def full(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number), "/data/file")


def raised(action: Callable[[], Any]) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        action()
    return caught.value


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "),
        RuntimeError("CUDA error: out of memory"),
        torch.distributed.DistBackendError(CUDA.format("2 'out of memory'")),
        MemoryError(),
    ],
)
def test_out_of_memory(error: Exception) -> None:
    assert exit_code_of(error) == EXIT_MEMORY == 77
    assert not is_hardware_fault(error)


def test_torch_says_what_is_looked_for() -> None:
    error = raised(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert exit_code_of(error) == EXIT_MEMORY, error


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_or_a_used_up_quota(number: int) -> None:
    def shard() -> None:
        try:
            raise full(number)
        except OSError as error:
            raise ShardWriteError("a shard could not be written") from error

    def hidden() -> None:
        try:
            raise full(number)
        except OSError as error:
            raise RecipeError(f"run_dir: it cannot be written: {error.strerror}") from None

    def cached() -> None:
        with writing(Path("cache")):
            raise full(number)

    for action in (shard, hidden, cached):
        assert exit_code_of(raised(action)) == EXIT_DISK == 78
    assert exit_code_of(full(number)) == EXIT_DISK
    # The errors of all ranks are joined as text; libraries in Rust have no errno.
    assert exit_code_of(SaveError(f"the checkpoint was not written: rank 1: OSError: {full(number)}")) == EXIT_DISK
    text = f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})"
    assert exit_code_of(Exception(text)) == EXIT_DISK


def test_other_errors_of_a_disk_keep_their_code() -> None:
    assert exit_code_of(CheckpointError("step-00000004/model.safetensors was altered")) == 4
    assert exit_code_of(full(errno.EACCES)) == EXIT_FAILED
    denied = SaveError(f"the checkpoint was not written: rank 1: PermissionError: {full(errno.EACCES)}")
    assert exit_code_of(denied) == 4


def test_a_run_dir_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path, _bytes: bytes) -> None:
        raise full()

    monkeypatch.setattr(Path, "write_bytes", fail)
    error = raised(lambda: make_run_dir(tmp_path / "run"))
    assert isinstance(error, PtftError)
    assert exit_code_of(error) == EXIT_DISK


# --- hardware and network ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: uncorrectable NVLink error detected during the execution",
        "CUDA error: unspecified launch failure",
        "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error",
        "GPU is lost. Reboot the system to recover this GPU",
        "NVRM: Xid 79, GPU has fallen off the bus.",
        CUDA.format("214 'uncorrectable ECC error encountered'"),
    ],
)
def test_a_faulty_gpu(text: str) -> None:
    """The texts of cudaGetErrorString in CUDA 13.0, and of NVML and the driver."""
    error = RuntimeError(text)
    assert is_hardware_fault(error)
    assert exit_code_of(error) == EXIT_LOST
    assert exit_code_of(error, cause=1) == EXIT_LOST  # it does not follow from what another rank has said


@pytest.mark.parametrize("text", [GLOO, REMOTE, SYSTEM, *CUT_OFF])
def test_a_lost_peer_follows_from_the_failure_that_was_announced_first(text: str) -> None:
    error = torch.distributed.DistBackendError(text)
    assert not is_hardware_fault(error)  # another machine may be the cause
    assert exit_code_of(error) == EXIT_LOST
    for code in (EXIT_FAILED, EXIT_LOST, EXIT_MEMORY, EXIT_DISK, 3):
        assert exit_code_of(error, cause=code) == code


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, row: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return row


def test_a_killed_data_worker_is_a_lost_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a killed rank is; the kernel kills the one or the other if the memory is used up."""
    with pytest.raises(RuntimeError, match="DataLoader worker") as killed:
        next(iter(torch.utils.data.DataLoader(Rows(), num_workers=1)))
    assert exit_code_of(killed.value) == EXIT_LOST
    assert exit_code_of(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. ")) == EXIT_FAILED
    FailureReport(tmp_path, Place(0, 1, 0, launched=False)).write(killed.value, EXIT_LOST, 1.0)
    assert "Perhaps the machine ran out of memory: lower data.workers" in caplog.text
    assert "Another rank" not in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "a bug",
        "CUDA error: device-side assert triggered",
        "CUDA error: an illegal memory access was encountered",
        "mat1 and mat2 shapes cannot be multiplied",
    ],
)
def test_an_error_in_the_program(text: str) -> None:
    assert exit_code_of(RuntimeError(text)) == EXIT_FAILED


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "code", "said"),
    [
        ("out_of_memory_in_rank:1:3", 77, "a smaller batch.micro_size"),
        ("full_disk_in_rank:1:3", 78, "free space, then start again"),
        ("faulty_gpu_in_rank:1:3", 76, "or its connection is faulty"),
    ],
)
def test_a_run_that_fails(tmp_path: Path, documents: Path, cache: Path, patch: str, code: int, said: str) -> None:
    """On one machine; the other rank only sees that its connection is closed."""
    write_recipe(tmp_path, documents, eval={"every": None})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2, patches=[patch])
    assert run.wait() == code, run.stderr
    assert set(run.exit_codes) == {code}
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["status"], result["exit_code"], result["host"]) == ("failed", code, socket.gethostname())
    assert result["error"].startswith("rank 1 failed first: ")
    assert said in result["error"]
    assert result.get("lost_hosts") == ([socket.gethostname()] if code == 76 else None)


# --- told once --------------------------------------------------------------------------------------------------------


def test_each_start_tells_its_failure_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Ranks that a shell starts have their parent and port in common with those that it started before, and ranks that
    a launcher starts again with those that failed."""
    variables = {"MASTER_PORT": str(free_port())}

    def told(rank: int, age_s: float = 0.0) -> int:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            report = FailureReport(tmp_path, Place(rank=rank, local_rank=rank, world_size=2, launched=True))
            if age_s:
                os.utime(report.claim, (time.time() - age_s,) * 2)
            report.write(RecipeError("a wrong key"), 2, 0.0)
        return capfd.readouterr().err.count("error: ")

    with messages():
        assert [told(0), told(1)] == [1, 0]
        began = time.time() - psutil.Process().create_time()  # the tests have run for so long
        assert told(0, began + 30) == 0
        assert [told(0, began + 120), told(1)] == [1, 0]
        variables["TORCHELASTIC_RESTART_COUNT"] = "1"
        assert [told(0), told(1)] == [1, 0]


def test_a_failure_removes_what_old_ones_have_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    report = FailureReport(tmp_path, Place(0, 1, 0, launched=False))
    old, young = report.claim.with_name("failed-old"), report.claim.with_name("failed-young")
    for path, hours in ((old, 25), (young, 23)):
        path.touch()
        os.utime(path, (time.time() - hours * 3600,) * 2)
    report.write(RecipeError("a wrong key"), 2, 0.0)
    assert sorted(path.name for path in report.claim.parent.iterdir()) == sorted([young.name, report.claim.name])
