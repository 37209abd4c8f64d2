"""What the functions of the Python API share."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from ptft_dist.config.load import as_json
from ptft_dist.config.secrets import hide
from ptft_dist.errors import PtftError, RecipeError

Source = str | Path | Mapping[str, Any]
"""A recipe: a file, the name of a shipped recipe, or its contents as nested dictionaries."""
Overrides = Mapping[str, Any] | Sequence[str]
"""Values that replace those of the recipe: {"optim.lr": 1e-4}, or ["optim.lr=1e-4"] as on the command line."""
_P = ParamSpec("_P")
_R = TypeVar("_R")


def hiding_secrets(call: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorator: mask the values of `${env:...}` references in the errors of `call`. A notebook saves tracebacks."""

    @functools.wraps(call)
    def hiding(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return call(*args, **kwargs)
        except PtftError as error:
            error.args = (hide(str(error)),)
            if any(hide(str(cause)) != str(cause) for cause in _causes(error)):
                raise error from None
            raise

    return hiding


def _causes(error: BaseException) -> Iterator[BaseException]:
    while (cause := error.__cause__ or error.__context__) is not None:
        yield cause
        error = cause


def as_words(overrides: Overrides) -> Sequence[str]:
    """The overrides as on the command line. Raises RecipeError for a value that a recipe cannot have."""
    if isinstance(overrides, Mapping):
        return [f"{key}={as_json(value)}" for key, value in overrides.items()]
    return overrides


def quiet_imports() -> None:
    """Hide warnings about kernels that are missing on a CPU, which bitsandbytes logs when it is imported."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def check_dtype(dtype: str | None) -> None:
    """Raises RecipeError unless it is the name of a data type of weights, or None."""
    if dtype not in (None, "fp32", "bf16", "fp16"):
        raise RecipeError(f"dtype: expected fp32, bf16 or fp16, got {dtype!r}")
