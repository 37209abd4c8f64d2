"""`ptft init`: copy files to start from. Does not import torch or Accelerate."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from ptft_dist.errors import RecipeError


def init(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="The target directory; created if missing.")],
    recipe: Annotated[str, typer.Option(help="A shipped recipe, such as clm or sft, or a file.")] = "clm",
    launch: Annotated[
        str | None, typer.Option(help="A launch config: a shipped one such as multi_gpu or zero3, or a file.")
    ] = None,
    site: Annotated[
        bool, typer.Option("--site", help="Also write a site profile, site.yaml, from what this Slurm cluster says.")
    ] = False,
) -> None:
    """Copy a recipe, a launch config with its DeepSpeed JSON, and a Slurm batch file, to start from."""
    from ptft_dist.config.shipped import find_shipped
    from ptft_dist.launch.launch_file import read_launch_file
    from ptft_dist.launch.local import default_launch

    source = find_shipped("recipes", recipe, ".yaml")
    file = read_launch_file(launch or default_launch())
    folder = Path(directory).expanduser()
    copies = {
        folder / source.name: source,
        folder / file.path.name: file.path,
        folder / "train.sbatch": find_shipped("slurm", "train", ".sbatch"),
    }
    named = (file.settings.deepspeed or {}).get("deepspeed_config_file")
    if file.deepspeed_json is not None and named is not None and not Path(named).is_absolute():
        copies[folder / named] = file.deepspeed_json
    if source.name == file.path.name:
        raise RecipeError(f"{source} and {file.path} have the same name; rename one of them")
    profile = _site_profile(folder / "site.yaml") if site else None
    _copy(folder, copies)
    if profile is not None:
        (folder / "site.yaml").write_text(profile)
    print(_next_steps(folder, list(copies), source.name, file.path.name))


def _site_profile(target: Path) -> str:
    """The text of the site profile. Raises RecipeError if the file exists, and SlurmError."""
    from ptft_dist.slurm.client import partitions
    from ptft_dist.slurm.site import proposed

    if target.exists():
        raise RecipeError(f"{target}: already exists, nothing was written; remove the file or use another directory")
    return proposed(partitions())


def _copy(folder: Path, copies: dict[Path, Path]) -> None:
    """Copy files: target -> source. Raises RecipeError before writing if a target exists or is outside of `folder`."""
    existing = [str(target) for target in copies if target.exists()]
    if existing:
        raise RecipeError(
            f"{', '.join(existing)}: already exists, nothing was written; remove the files or use another directory"
        )
    outside = [str(target) for target in copies if not target.resolve().is_relative_to(folder.resolve())]
    if outside:
        raise RecipeError(f"{', '.join(outside)}: outside of {folder}; name the DeepSpeed JSON by its absolute path")
    try:
        for target, source in copies.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    except OSError as error:
        raise RecipeError(f"{folder} cannot be written: {error.strerror}") from None


def _next_steps(folder: Path, written: list[Path], recipe: str, launch: str) -> str:
    lines = [f"wrote {', '.join(str(path.relative_to(folder)) for path in written)} to {folder}", "next:"]
    steps = {
        f"cd {folder}": "",
        f"edit {recipe}": "data.train: the data; run_dir: the output directory",
        f"ptft config check {recipe}": "lists all mistakes with their lines",
        f"ptft train {recipe} --launch {launch}": "on this machine; --processes N for another number",
        f"sbatch train.sbatch {recipe} --launch {launch}": "on Slurm; put --nodes and --gpus-per-node before the file",
    }
    width = max(map(len, steps))
    return "\n".join([*lines, *(f"  {step:{width}}  {hint}".rstrip() for step, hint in steps.items())])
