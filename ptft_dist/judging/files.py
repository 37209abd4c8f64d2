"""Files with results, written completely or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ptft_dist.errors import PtftError, RecipeError


def check_writable(out: Path) -> None:
    """Create the directory of a file. Raises RecipeError, before the work takes its time."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{out}: cannot be written: {error.strerror}. Name another file") from None
    if out.is_dir():
        raise RecipeError(f"{out}: this is a directory. Name a file, such as {out / 'result.json'}")


def write_file(out: Path, parts: Iterable[bytes]) -> None:
    """Write a file atomically. Raises PtftError."""
    unfinished = out.with_name(f".{out.name}.partial")
    try:
        with unfinished.open("wb") as file:
            file.writelines(parts)
        unfinished.replace(out)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise PtftError(f"{out}: cannot be written: {error.strerror}. Make room, or name another file") from error
