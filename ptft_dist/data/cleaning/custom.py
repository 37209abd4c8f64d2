"""A function of the user as a step."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from ptft_dist.config.cleaning import CustomStep
from ptft_dist.data.cache import HashMemo
from ptft_dist.data.cleaning.text_step import Cleaned
from ptft_dist.errors import DataError, RecipeError


class Custom:
    """Calls the function that `custom.function` names with each text; None drops the record."""

    libraries: ClassVar[tuple[str, ...]] = ()
    edits: ClassVar[bool] = True

    def __init__(self, settings: CustomStep, base: Path) -> None:
        """base: the recipe's directory, where the module is searched first.

        Raises:
            RecipeError: there is no such module or function, or it cannot be called with one text.
        """
        self._name = settings.function
        self._function, self._file = _load(self._name, base)

    def contents(self, memo: HashMemo) -> Any:
        """What affects the results besides the settings: the file of the module, but not the modules it imports."""
        return memo.digests([self._file]) if self._file else []

    def __call__(self, text: str) -> Cleaned:
        """
        Raises:
            DataError: the function returned something else than a text or None.
        """
        new = self._function(text)
        if new is None:
            return Cleaned(text, dropped=f"custom: {self._name}")
        if not isinstance(new, str):
            raise DataError(
                f"data.steps: custom: {self._name} returned {type(new).__name__}. It must return the new text, or None "
                "to drop the record."
            )
        return Cleaned(new)


def _load(name: str, base: Path) -> tuple[Callable[[str], Any], Path | None]:
    """The function, and the source file of its module."""
    module_name, _, attribute = name.rpartition(".")
    module = _import(module_name, name, base)
    function = getattr(module, attribute, None)
    if function is None:
        raise _refused(name, f"the module {module_name} has no function {attribute!r}. Correct the name.")
    if not callable(function):
        raise _refused(name, f"this is {type(function).__name__}, not a function. Name a function.")
    try:
        inspect.signature(function).bind("text")
    except TypeError as error:
        raise _refused(
            name, f"it cannot be called with one text ({error}). It must take one positional argument."
        ) from None
    except ValueError:  # a function of a compiled module may have no signature
        pass
    file = getattr(module, "__file__", None)
    return function, Path(file) if file else None


def _import(module: str, name: str, base: Path) -> ModuleType:
    """Import with the recipe's directory first on the path. A module there is read anew, since it may have changed."""
    top = module.partition(".")[0]
    if (base / top).is_dir() or (base / f"{top}.py").is_file():
        for known in [each for each in sys.modules if each == top or each.startswith(f"{top}.")]:
            del sys.modules[known]
    importlib.invalidate_caches()
    sys.path.insert(0, str(base.absolute()))
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise _refused(
                name, f"there is no module {error.name!r}. It must be in the recipe's directory or installed."
            ) from None
        raise _refused(name, f"importing {module} failed ({error}). Install what it needs.") from error
    except Exception as error:  # whatever the user's module raises
        raise _refused(name, f"importing {module} failed ({type(error).__name__}: {error}). Correct it.") from error
    finally:
        sys.path.remove(str(base.absolute()))


def _refused(name: str, problem: str) -> RecipeError:
    return RecipeError(f"data.steps: custom: function: {name}: {problem}")
