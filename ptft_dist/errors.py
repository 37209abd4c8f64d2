"""Errors that a user can cause, each with its own exit code, and the sorting of other errors."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import NamedTuple

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
EXIT_LOST = 76
"""Another process, its machine or a GPU is gone, so that a new start may succeed."""
EXIT_MEMORY = 77
"""Out of memory: a new start would only fail in the same way."""
EXIT_DISK = 78
"""The disk is full or the quota is used up."""

REMEDIES = {
    EXIT_MEMORY: (
        "Out of memory. Remedies: a smaller batch.micro_size (batch.micro_tokens), model.gradient_checkpointing: true, "
        "a higher ZeRO stage, or more processes"
    ),
    EXIT_DISK: "The disk is full or the quota is used up: free space, then start again to resume",
}

# Texts of torch, NCCL and CUDA, because their errors have neither a class nor a number. Class names are compared as
# text, since this module imports no torch.
_NETWORK_CLASSES = ("DistNetworkError", "DistStoreError")  # a port in use, or no answer
_NETWORK = (
    "gloo/transport/",  # the file that an error of gloo's connections begins with
    "closed by peer",
    "reset by peer",
    "connectFullMesh failed",
    "remote process exited or there was a network error",  # ncclRemoteError
    "unhandled system error",  # ncclSystemError: a call to a socket, most often since another process has ended
)
_HARDWARE = (
    "uncorrectable ECC error",
    "uncorrectable NVLink error",
    "over nvlink or a hardware error",
    "hardware stack error",
    "unspecified launch failure",
    "unhandled cuda error",  # ncclUnhandledCudaError
    "GPU is lost",
    "device is lost",
    "fallen off the bus",
)
_MEMORY = ("DefaultCPUAllocator: can't allocate memory", "out of memory")
_DISK = tuple(
    text
    for number, words in ((errno.ENOSPC, "No space left on device"), (errno.EDQUOT, "Disk quota exceeded"))
    for text in (words, f"[Errno {number}]", f"(os error {number})")
)


class PtftError(Exception):
    """Base class of errors with an explanation: file, line or key, and the remedy. No traceback is shown."""

    exit_code = 1


class RecipeError(PtftError):
    """The recipe, the command line or a launch config is wrong."""

    exit_code = 2


class StillRunningError(PtftError):
    """A requeued job found the process of its earlier start still at work, such as on a host that was cut off."""

    exit_code = EXIT_STOPPED


class DataError(PtftError):
    """An input file is missing, unreadable, empty or malformed."""

    exit_code = 3


class CheckpointError(PtftError):
    """A checkpoint is missing, damaged, or does not belong to this recipe."""

    exit_code = 4


class CheckpointVersionError(CheckpointError):
    """A checkpoint was written by another version of ptft. It is not damaged, so a resume does not skip it."""


class ShardWriteError(CheckpointError):
    """This rank could not write its shard. It must exit at once, because the other ranks wait for it in the write."""


class NonFiniteLossError(PtftError):
    """The loss or the gradient norm became NaN or infinite; the weights of this update are not saved."""

    exit_code = 5


class MachineLostError(PtftError):
    """Another machine of the run does not answer, or its processes have ended without a word."""

    exit_code = EXIT_LOST


class Failure(NamedTuple):
    """The failure of a rank, as the other ranks learn of it."""

    rank: int
    """-1 if the rank is not known."""
    host: str
    exit_code: int
    text: str

    @property
    def said(self) -> str:
        return self.text if self.rank < 0 else f"rank {self.rank} on {self.host}: {self.text}"


def exit_code_of(error: BaseException, cause: int | None = None) -> int:
    """The exit code for an error.

    cause: the exit code of the failure that another rank has announced before, if there is one. A broken connection
    follows from it.
    """
    if is_disk_full(error):
        return EXIT_DISK
    if isinstance(error, PtftError):
        return error.exit_code
    if _is_out_of_memory(error):
        return EXIT_MEMORY
    if is_hardware_fault(error) or is_killed_worker(error):
        return EXIT_LOST
    if is_network_failure(error):
        return EXIT_LOST if cause is None else cause
    return EXIT_FAILED


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk was full or the quota used up, at this error or at one that it follows from.

    The text is searched too: ranks exchange errors as text, and libraries in Rust have no errno.
    """
    return any(
        (isinstance(each, OSError) and each.errno in (errno.ENOSPC, errno.EDQUOT)) or _says(each, _DISK)
        for each in _chain(error)
    )


def is_hardware_fault(error: BaseException) -> bool:
    """Whether a GPU of this machine, or its connection, is faulty."""
    return not isinstance(error, PtftError) and not _is_out_of_memory(error) and _says(error, _HARDWARE)


def is_killed_worker(error: BaseException) -> bool:
    """Whether a process that reads data for this rank was killed. The texts are those of torch.utils.data."""
    return str(error).startswith("DataLoader worker") and _says(error, ("by signal: Killed", "exited unexpectedly"))


def is_network_failure(error: BaseException) -> bool:
    """Whether the connection to another process broke, or was never made."""
    return type(error).__name__ in _NETWORK_CLASSES or _says(error, _NETWORK)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or _says(error, _MEMORY)


def _says(error: BaseException, phrases: tuple[str, ...]) -> bool:
    return any(phrase in str(error) for phrase in phrases)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it follows from, also those hidden by `from None`."""
    each: BaseException | None = error
    seen: set[int] = set()
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        yield each
        each = each.__cause__ or each.__context__
