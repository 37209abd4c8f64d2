"""`ptft init`: files to start from: copies, or a recipe for a file of data. Does not import torch or Accelerate."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ptft_dist.config.places import expanded
from ptft_dist.errors import RecipeError

_FIRST_RUN = re.compile(r"^# First run: ptft train (\w+)$", re.MULTILINE)
"""The comment of a shipped recipe that continues from the network of another one."""


def init(
    first: Annotated[
        str | None, typer.Argument(metavar="TASK", help="With --data: the task. Default: the most likely one.")
    ] = None,
    second: Annotated[
        str | None, typer.Argument(metavar="DIR", help="The target directory; created if missing.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A shipped recipe, such as clm (default) or sft, or a file.")
    ] = None,
    launch: Annotated[
        str | None, typer.Option(help="A launch config: a shipped one such as multi_gpu or zero3, or a file.")
    ] = None,
    site: Annotated[
        bool, typer.Option("--site", help="Also write a site profile, site.yaml, from what this Slurm cluster says.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="A file, folder or glob of data: look at it, and write a recipe for it.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --data: a pretrained network, a directory or Hub name.")
    ] = None,
) -> None:
    """Copy a recipe, a launch config and a Slurm batch file, to start from; or write a recipe for --data FILE.

    ptft init DIR [--recipe sft] [--launch zero3] [--site]

    ptft init [TASK] --data FILE [DIR] [--model NAME]
    """
    if data is not None:
        copying = {"--recipe": recipe, "--launch": launch, "--site": site or None}
        for option, value in copying.items():
            if value is not None:
                raise RecipeError(f"{option}: has no effect with --data, which writes a recipe only")
        _write_recipe(data, *_task_and_folder(first, second), model)
    elif model is not None:
        raise RecipeError("--model: has no effect here: it needs --data")
    elif first is None or second is not None:
        raise RecipeError("expected one directory: ptft init DIR, or ptft init [TASK] --data FILE [DIR]")
    else:
        _copy_shipped(first, recipe or "clm", launch, site)


def _task_and_folder(first: str | None, second: str | None) -> tuple[str | None, Path]:
    """The words before and after --data: [TASK] [DIR]. Raises RecipeError if the first of two is no task."""
    from difflib import get_close_matches

    from ptft_dist.tasks.registry import TASKS

    if first is None or first in TASKS:
        return first, expanded(second or ".")
    near = get_close_matches(first, TASKS, n=1, cutoff=0.7)
    if second is not None or (near and not Path(first).exists()):
        hint = f"; did you mean {near[0]}?" if near else f"; the tasks are {', '.join(TASKS)}"
        raise RecipeError(f"there is no task {first}{hint}")
    return None, expanded(first)


def _write_recipe(data: Path, task: str | None, folder: Path, model: str | None) -> None:
    """Write TASK.yaml for a file of data, and print what was seen. Raises DataError and RecipeError."""
    from ptft_dist.data.survey import survey
    from ptft_dist.reporting.output import write_text
    from ptft_dist.starter import start_for
    from ptft_dist.tasks.registry import recipe_class

    start = start_for(survey(data), recipe_class(), folder, task=task, model=model)
    target = folder / f"{start.task}.yaml"
    if target.exists():
        raise RecipeError(f"{target}: already exists, nothing was written; remove the file or use another directory")
    write_text(target, start.text)
    print("\n".join(start.seen))
    proposed = "" if task else f"; other tasks that fit: {', '.join(start.others)}" if start.others else ""
    print(f"task {start.task}{proposed}\nwrote {target}; next:")
    quoted = shlex.quote(str(target))
    steps = _first_runs(start.first) | {
        f"ptft config check {quoted}": "lists all mistakes with their lines",
        f"ptft data inspect {quoted}": "prepares the data, and shows rows as the network sees them",
        f"ptft train {quoted}": "on this machine; add --launch multi_gpu for several GPUs",
    }
    print(_aligned(steps))


def _copy_shipped(directory: str, recipe: str, launch: str | None, site: bool) -> None:
    """Copy a recipe, a launch config with its DeepSpeed JSON, and a Slurm batch file."""
    from ptft_dist.config.shipped import find_shipped
    from ptft_dist.launch.launch_file import read_launch_file
    from ptft_dist.launch.local import default_launch

    source = find_shipped("recipes", recipe, ".yaml")
    file = read_launch_file(launch or default_launch())
    folder = expanded(directory)
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
    written = [*copies, *([folder / "site.yaml"] if site else [])]
    before = _FIRST_RUN.findall(source.read_text("utf-8"))
    print(_next_steps(folder, written, source.name, file.path.name, before))


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


def _next_steps(folder: Path, written: list[Path], recipe: str, launch: str, first: list[str]) -> str:
    lines = [f"wrote {', '.join(str(path.relative_to(folder)) for path in written)} to {folder}", "next:"]
    recipe, launch = shlex.quote(recipe), shlex.quote(launch)
    steps = {
        f"cd {shlex.quote(str(folder))}": "",
        **_first_runs(first),
        f"edit {recipe}": "data.train: the data; run_dir: the output directory",
        f"ptft config check {recipe}": "lists all mistakes with their lines",
        f"ptft train {recipe} --launch {launch}": "on this machine; --processes N for another number",
    }
    if folder / "site.yaml" in written:
        words = f"ptft submit {recipe} --site site.yaml --launch {launch}"
        steps[words] = "on Slurm; --nodes N --gpus-per-node G --time 24:00:00"
    else:
        words = f"sbatch train.sbatch {recipe} --launch {launch}"
        steps[words] = "on Slurm; put --nodes and --gpus-per-node before the file"
    if str(folder) == ".":
        del steps["cd ."]
    return "\n".join([*lines, _aligned(steps)])


def _first_runs(names: list[str]) -> dict[str, str]:
    """The shipped recipes that make the networks that a recipe names -> what for."""
    return {f"ptft train {name}": f"first: makes runs/{name}/model, which the recipe names" for name in names}


def _aligned(steps: dict[str, str]) -> str:
    """Commands and what they do, one a line."""
    width = max(map(len, steps))
    return "\n".join(f"  {step:{width}}  {hint}".rstrip() for step, hint in steps.items())
