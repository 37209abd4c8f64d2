"""The files that travel with the program: launch configs, DeepSpeed configs, Slurm templates and recipes."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from ptft_dist.errors import RecipeError

Kind = Literal["launch_configs", "ds_configs", "slurm", "recipes"]

_ONE: dict[Kind, str] = {
    "launch_configs": "launch config",
    "ds_configs": "DeepSpeed config",
    "slurm": "Slurm file",
    "recipes": "recipe",
}


def shipped(kind: Kind) -> Path:
    """The folder of shipped files of this kind: inside the installed package, or else in the checkout."""
    package = Path(__file__).parent.parent
    installed = package / "shipped" / kind
    return installed if installed.is_dir() else package.parent / kind


def find_shipped(kind: Kind, name: str, suffix: str) -> Path:
    """The file that `name` means: an existing file, or else a shipped one, with or without its suffix.

    A shipped file in a subfolder is found by `folder/name`, and by `name` alone if no other has it.
    Raises RecipeError with the nearest name and all available ones.
    """
    given = Path(name).expanduser()
    try:
        is_directory = given.is_dir()
        if given.exists() and not is_directory:
            return given
    except OSError as error:
        raise RecipeError(f"{name}: {error.strerror}") from None
    folder = shipped(kind)
    available = {
        path.relative_to(folder).as_posix().removesuffix(suffix): path for path in sorted(folder.rglob(f"*{suffix}"))
    }
    wanted = name.removesuffix(suffix)
    found = [path for key, path in available.items() if wanted == key] or [
        path for key, path in available.items() if wanted == key.rpartition("/")[2]
    ]
    if len(found) == 1:
        return found[0]
    if is_directory:
        raise RecipeError(f"{name}: a {_ONE[kind]} is a file, but this is a directory")
    raise RecipeError(f"{name}: {_not_found(kind, wanted, found, available)}")


def _not_found(kind: Kind, wanted: str, found: list[Path], available: dict[str, Path]) -> str:
    if found:
        names = [key for key, path in available.items() if path in found]
        return f"this name has more than one shipped {_ONE[kind]}: {', '.join(names)}"
    near = get_close_matches(wanted, available, n=1) or get_close_matches(Path(wanted).name, available, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    listing = f" Shipped: {', '.join(available)}" if available else ""
    return f"no such file, and no shipped {_ONE[kind]} has this name{hint}{listing}"
