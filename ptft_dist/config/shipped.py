"""The files that are installed with the package: launch configs, DeepSpeed configs, Slurm batch files, recipes."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from ptft_dist.errors import RecipeError

Kind = Literal["launch_configs", "ds_configs", "slurm", "recipes"]

_SINGULAR: dict[Kind, str] = {
    "launch_configs": "launch config",
    "ds_configs": "DeepSpeed config",
    "slurm": "Slurm batch file",
    "recipes": "recipe",
}


def shipped(kind: Kind) -> Path:
    """The folder of shipped files of this kind: in the installed package, or else in the checkout."""
    package = Path(__file__).parent.parent
    installed = package / "shipped" / kind
    return installed if installed.is_dir() else package.parent / kind


def find_shipped(kind: Kind, name: str, suffix: str) -> Path:
    """The file that `name` stands for: an existing file, or else a shipped one, with or without its suffix.

    A shipped file in a subfolder is found by `folder/name`, and by `name` alone if that is unique.
    Raises RecipeError, with the nearest name and all available names.
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
    matches = [path for key, path in available.items() if wanted == key] or [
        path for key, path in available.items() if wanted == key.rpartition("/")[2]
    ]
    if len(matches) == 1:
        return matches[0]
    if is_directory:
        raise RecipeError(f"{name}: a {_SINGULAR[kind]} is a file, and this is a directory; give the file in it")
    raise RecipeError(f"{name}: {_not_found(kind, wanted, matches, available)}")


def _not_found(kind: Kind, wanted: str, matches: list[Path], available: dict[str, Path]) -> str:
    if matches:
        names = [key for key, path in available.items() if path in matches]
        return f"this name has more than one shipped {_SINGULAR[kind]}: {', '.join(names)}"
    near = get_close_matches(wanted, available, n=1) or get_close_matches(Path(wanted).name, available, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    listing = f" Shipped: {', '.join(available)}" if available else ""
    return f"no such file, and no shipped {_SINGULAR[kind]} has this name{hint}{listing}"
