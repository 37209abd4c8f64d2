"""Paths of this machine, and the local directories that come before models of the Hub."""

from __future__ import annotations

from pathlib import Path

from ptft_dist.errors import RecipeError


def expanded(path: str | Path) -> Path:
    """The path with the home directory of a leading `~` or `~user`. Raises RecipeError if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise RecipeError(f"{path}: {Path(path).parts[0]} has no home directory here; write the whole path") from None


def local_directory(name: str, base: Path, key: str) -> Path | None:
    """The directory with this name, relative to `base` or else to the current directory; None for a Hub name.

    Args:
        base: the recipe's directory.
        key: the recipe's key that names it, for the message.

    Raises:
        RecipeError: the name has the form of a path, and there is no such directory.
    """
    given = expanded(name)
    folders = dict.fromkeys([base, Path.cwd()])
    for folder in folders:
        if (folder / given).is_dir():
            return folder / given
    if given.is_absolute() or name.startswith(".") or name.count("/") > 1:
        where = "" if given.is_absolute() else f" in {' or '.join(map(str, folders))}"
        raise RecipeError(f"{key}: there is no directory {name}{where}")
    return None
