"""Files that a user asks for, written completely or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ptft_dist.errors import PtftError, RecipeError
from ptft_dist.reporting.tables import SEPARATORS


def check_writable(out: Path) -> None:
    """Create the directory of a file. Raises RecipeError, before the work takes its time."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{out}: cannot be written: {error.strerror}. Name another file") from None
    if out.is_dir():
        raise RecipeError(f"{out}: this is a directory. Name a file, such as {out / 'result.json'}")


def check_answers_file(out: Path) -> None:
    """Raises RecipeError unless the file of answers ends with .jsonl (JSON lines), .csv or .tsv (a table)."""
    if out.suffix not in (".jsonl", *SEPARATORS) and not out.is_dir():
        raise RecipeError(
            f"{out}: the answers are written as JSON lines or as a table. Name a .jsonl, .csv or .tsv file: "
            f"{out.with_suffix('.jsonl')}"
        )


def write_file(out: Path, parts: Iterable[bytes]) -> None:
    """Write a file atomically, with its directory. Raises PtftError."""
    unfinished = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("wb") as file:
            file.writelines(parts)
        unfinished.replace(out)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise PtftError(f"{out}: cannot be written: {error.strerror}. Make room, or name another file") from error


def json_line(value: Any) -> bytes:
    """The value as a line of JSON in UTF-8. Half a surrogate pair, which UTF-8 cannot encode, is escaped."""
    return json.dumps(value, ensure_ascii=False, default=str).encode(errors="backslashreplace") + b"\n"


def write_text(out: Path, text: str) -> None:
    """Write a text atomically, with its directory. Raises PtftError."""
    write_file(out, [text.encode("utf-8", errors="backslashreplace")])
