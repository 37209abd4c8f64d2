"""The end of a process that other processes of the run may wait for."""

from __future__ import annotations

import contextlib
import os


def end_now(code: int) -> None:
    """Exit without interpreter shutdown.

    After a failure, other ranks may wait in a collective, and leaving the process group would wait for them. After a
    success, see Engine.close.
    """
    import multiprocessing
    import sys

    for reader in multiprocessing.active_children():
        reader.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader has ended, or the disk is full
            stream.flush()
    os._exit(code)
