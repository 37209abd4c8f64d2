"""Errors that a user can cause, each with its own exit code."""

from __future__ import annotations

EXIT_FINISHED = 0
EXIT_FAILED = 1
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"
EXIT_LOST = 76
"""Another process or its machine is gone, so that a new start may succeed."""
_PEER_LOST = ("closed by peer", "reset by peer", "connectFullMesh failed")
_NETWORK = ("DistNetworkError", "DistStoreError")
"""Errors of torch.distributed, by name, since this module imports no torch: a port in use, or no answer."""


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


def exit_code_of(error: BaseException, cause: str | None = None) -> int:
    """The exit code for an error. cause: the earlier failure that it follows from, if one is known."""
    if isinstance(error, PtftError):
        return error.exit_code
    network = type(error).__name__ in _NETWORK or any(phrase in str(error) for phrase in _PEER_LOST)
    return EXIT_LOST if network and cause is None else EXIT_FAILED
