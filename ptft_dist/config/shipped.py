"""The files that are installed with the package: launch and DeepSpeed configs, Slurm files, recipes, pipelines and
searches."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from ptft_dist.config.places import expanded
from ptft_dist.errors import RecipeError

Kind = Literal["launch_configs", "ds_configs", "slurm", "recipes", "pipelines", "sweeps"]

_SINGULAR: dict[Kind, str] = {
    "launch_configs": "launch config",
    "ds_configs": "DeepSpeed config",
    "slurm": "site profile or Slurm script",
    "recipes": "recipe",
    "pipelines": "pipeline",
    "sweeps": "search",
}


def shipped(kind: Kind) -> Path:
    """The directory of shipped files of one kind: in the installed package, or else in the git checkout."""
    package = Path(__file__).parent.parent
    installed = package / "shipped" / kind
    return installed if installed.is_dir() else package.parent / kind


def find_shipped(kind: Kind, name: str, suffix: str) -> Path:
    """Find a file by its path, or a shipped file by its name without suffix.

    The name of a shipped file in a subfolder is `folder/name`, or `name` if this is unique. `clm.yaml` is a file only:
    in another directory, the shipped clm would take the place of the user's own.

    Raises:
        RecipeError: there is no such file. The message contains the nearest name and all available names.
    """
    given = expanded(name)
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
    if len(matches) == 1 and wanted == name:
        return matches[0]
    if is_directory:
        raise RecipeError(f"{name}: this is a directory, not a {_SINGULAR[kind]}; give a file in it")
    raise RecipeError(f"{name}: {_not_found(kind, wanted, matches, available)}")


def _not_found(kind: Kind, wanted: str, matches: list[Path], available: dict[str, Path]) -> str:
    if len(matches) == 1:
        (key,) = (key for key, path in available.items() if path in matches)
        return f"no such file here, in {Path.cwd()}; the shipped {_SINGULAR[kind]} is called {key}"
    if matches:
        names = [key for key, path in available.items() if path in matches]
        return f"there is more than one shipped {_SINGULAR[kind]} with this name; use one of: {', '.join(names)}"
    near = get_close_matches(wanted, available, n=1) or get_close_matches(Path(wanted).name, available, n=1)
    hint = f"; did you mean {near[0]}?" if near else "."
    listing = f" Shipped: {', '.join(available)}" if available else ""
    return f"no such file, and no shipped {_SINGULAR[kind]} has this name{hint}{listing}"
