"""Local directories and Hub names of networks, and the base of an adapter directory. Does not import torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ptft_dist.config.named_models import named_models
from ptft_dist.config.places import local_directory
from ptft_dist.config.recipe import Recipe
from ptft_dist.errors import CheckpointError, RecipeError

ADAPTER_CONFIG = "adapter_config.json"


def directory_or_hub_name(path: str, base: Path, key: str) -> str:
    """The absolute path of a directory, or the name of a model on the Hub.

    A relative path starts at the recipe's directory, `base`, or else at the current directory.

    Raises:
        RecipeError: the name has the form of a path, and there is no such directory.
    """
    directory = local_directory(path, base, key)
    return path if directory is None else str(_without_dots(directory))


def check_revisions(recipe: Recipe, base: Path) -> None:
    """Raises RecipeError if a local directory is named with a revision, which only a model of the Hub has.

    base: the recipe's directory.
    """
    for named in named_models(recipe):
        try:
            local = named.revision is not None and local_directory(named.name, base, named.key)
        except RecipeError:  # it may not exist yet, and is reported when it is read
            continue
        if local:
            keys = [f"{key.rpartition('.')[0]}.revision" for key in named.key.split(", ")]
            raise RecipeError(
                f"{keys[0]}: has no effect on the local directory {local}; only models of the Hub have revisions. "
                "Remove it, or rename that directory"
            )


def _without_dots(path: Path) -> Path:
    """The path of a directory without `..`. An adapter stores it as its base, and must find it after a move of the
    recipe's directory."""
    plain = Path(os.path.normpath(path))
    return plain if plain.is_dir() and plain.samefile(path) else path  # `..` after a link may lead elsewhere


def check_not_replaced(recipe: Recipe, base: Path) -> None:
    """Raises RecipeError if a run would replace a model that its recipe names by the trained one.

    base: the recipe's directory.
    """
    written = (Path(recipe.run_dir) / "model").resolve()
    for named in named_models(recipe):
        try:
            place = Path(directory_or_hub_name(named.name, base, named.key))
        except RecipeError:  # it may not exist yet, and is reported when it is read
            continue
        if named.weights and place.is_dir() and place.resolve().is_relative_to(written):
            raise RecipeError(
                f"run_dir: the trained model is written to {written}, which would replace the model of {named.key}. "
                "Choose another run_dir, or move that model"
            )


def is_adapter(path: str | Path) -> bool:
    """Whether a local directory contains an adapter."""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def adapter_base(path: str | Path) -> tuple[str, str | None]:
    """Directory or Hub name of an adapter's base, and its revision. Raises RecipeError if its config is unreadable."""
    file = Path(path) / ADAPTER_CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return str(config["base_model_name_or_path"]), config.get("revision")
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"{file} cannot be read: {error}. Export the adapter again") from None


def model_of(path: str | Path) -> Path:
    """The model or adapter directory that is `path`, or that the run in `path` has written. Raises CheckpointError."""
    given = Path(path)
    model = given / "model" if (given / "model").is_dir() else given
    if not any((model / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise CheckpointError(f"{given}: there is no model. A finished run writes it to {given / 'model'}.")
    return model
