"""A file with finished parts of long work, so that an interrupted command goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ptft_dist.errors import PtftError
from ptft_dist.reporting.output import json_line


class Journal:
    """JSON lines that are appended one by one; the first line says what they belong to.

    A line that was cut off by a kill is dropped. The lines of other work are dropped as a whole.
    """

    def __init__(self, path: Path, identity: Any) -> None:
        """identity: what the lines depend on, as JSON.

        Raises:
            PtftError: the file cannot be written, or another command writes it now.
        """
        self.path = path
        header = json.dumps(identity, sort_keys=True).encode() + b"\n"
        self.count = 0
        """Number of lines, without the first."""
        try:
            self._file = path.open("a+b")
            self._lock()
            self._file.seek(0)
            size = len(header)
            if self._file.readline() == header:
                for line in self._file:
                    if not line.endswith(b"\n"):
                        break
                    size += len(line)
                    self.count += 1
                self._file.truncate(size)
            else:
                self._file.truncate(0)
                self._file.write(header)
                self._file.flush()
            self._start = len(header)
        except OSError as error:
            raise self._problem(error) from None

    def _lock(self) -> None:
        """Until the file is closed. Two commands with the same output would mix their lines."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise PtftError(
                f"{self.path}: another command writes it now. Wait until it has ended, or name another file"
            ) from None
        except OSError:  # a file system without locks
            return

    def add(self, *values: Any) -> None:
        """Append a line for each value. Raises PtftError if the disk is full."""
        try:
            self._file.write(b"".join(map(json_line, values)))
            self._file.flush()
        except OSError as error:
            raise self._problem(error) from error
        self.count += len(values)

    def keep(self, count: int) -> None:
        """Drop all lines after the first `count`."""
        size = self._start + sum(len(line) for line in itertools.islice(self.lines(), count))
        self._file.truncate(size)
        self.count = count

    def lines(self) -> Iterator[bytes]:
        """The lines after the first, as bytes."""
        with self.path.open("rb") as file:
            file.seek(self._start)
            yield from file

    def values(self) -> Iterator[Any]:
        return map(json.loads, self.lines())

    def close(self) -> None:
        if not self._file.closed:
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_UN)  # also for processes that were forked meanwhile
            self._file.close()

    def remove(self) -> None:
        """Close and delete the file, when its contents are elsewhere."""
        self.close()
        self.path.unlink(missing_ok=True)

    def _problem(self, error: OSError) -> PtftError:
        return PtftError(f"{self.path}: cannot be written: {error.strerror}. Make room, or name another file")
