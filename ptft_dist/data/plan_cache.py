"""A cache of update plans, so that a run over millions of rows does not scan their lengths at every start.

A file contains the hash of an array, then the array in NumPy's format. A missing or damaged plan is computed again. If
a plan cannot be written, the run continues without the cached copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ptft_dist.data.cache import fingerprint

_DIGEST_BYTES = 32


def remembered(directory: Path, key: Any, build: Callable[[], np.ndarray]) -> np.ndarray:
    """The int64 array of `build()`, from `directory` if it has an undamaged copy for this key (a JSON value)."""
    path = directory / f"{fingerprint(key)}.plan"
    known = _read(path)
    if known is not None:
        return known
    array = np.ascontiguousarray(build(), dtype=np.int64)
    with contextlib.suppress(OSError):  # a full disk or a read-only cache: the next start computes the plan again
        _write(path, array)
    return array


def _read(path: Path) -> np.ndarray | None:
    try:
        data = path.read_bytes()
    except OSError:
        return None
    digest, body = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest() != digest:
        return None
    return np.load(io.BytesIO(body), allow_pickle=False)


def _write(path: Path, array: np.ndarray) -> None:
    """Write a temporary file and rename it: ranks write at the same time, and none may read an incomplete file."""
    body = io.BytesIO()
    np.save(body, array)
    path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
        try:
            file.write(hashlib.blake2b(body.getvalue(), digest_size=_DIGEST_BYTES).digest())
            file.write(body.getvalue())
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
