"""The errors that a user can cause or meet, each with the exit code that tells a script which kind it was."""

from __future__ import annotations

EXIT_FINISHED = 0
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: "try again later"


class PtftError(Exception):
    """A failure that we can explain. Its message names the file, line or key and the remedy; no traceback is shown."""

    exit_code = 1


class RecipeError(PtftError):
    """The recipe, the command line or a launch config is wrong."""

    exit_code = 2


class DataError(PtftError):
    """An input file is missing, unreadable, empty or malformed."""

    exit_code = 3


class CheckpointError(PtftError):
    """A checkpoint is missing, damaged, or does not belong to this recipe."""

    exit_code = 4


class CheckpointVersionError(CheckpointError):
    """A checkpoint of another version of the program. It is not damaged, so it is never skipped for an older one."""


class ShardWriteError(CheckpointError):
    """This rank could not write its shard. The others wait for it inside the write, so it must end at once."""


class NonFiniteLossError(PtftError):
    """The loss or the gradient norm became NaN or infinite; the weights of that step were not kept."""

    exit_code = 5
