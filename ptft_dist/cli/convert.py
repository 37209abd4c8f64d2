"""`ptft convert`: a configuration of another trainer as a recipe. Does not import torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ptft_dist.converting.convert import Converted


def convert(
    file: Annotated[
        Path, typer.Argument(help="YAML or JSON of TRL, axolotl, LLaMA-Factory or TrainingArguments.", metavar="FILE")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value of the recipe, such as model.path=gpt2.", metavar="[KEY=VALUE]..."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.yaml"),
    task: Annotated[str | None, typer.Option(help="The task, if the file does not say it.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes of that training; they multiply its batch.")] = 1,
) -> None:
    """Write a recipe that does the same as a configuration of another trainer, and say what becomes of each key."""
    from ptft_dist import api

    converted, mistakes = api.convert(file, out, overrides or [], task=task, processes=processes)
    print(_report(converted, processes))
    print(f"wrote {out}")
    if mistakes:
        print("still missing or wrong:\n" + "\n".join(f"  {line}" for line in mistakes.splitlines()))
    quoted = shlex.quote(str(out))
    launch = f" --launch {converted.launch}" if converted.launch else ""
    print(f"next:\n  ptft config check {quoted}\n  ptft train {quoted}{launch}")


def _report(converted: Converted, processes: int) -> str:
    lines = [f"recognized: {converted.trainer}, task {converted.task}, {processes} process{'es' * (processes > 1)}"]
    blocks = {
        "converted": converted.converted,
        f"defaults of {converted.trainer}": converted.defaults,
        "no counterpart": converted.lost,
    }
    for title, entries in blocks.items():
        width = max(map(len, entries), default=0)
        lines += [f"{title}:"] * bool(entries) + [f"  {name:{width}}  {text}" for name, text in entries.items()]
    return "\n".join([*lines, *(f"note: {remark}" for remark in converted.remarks)])
