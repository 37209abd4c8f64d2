"""`ptft export`: export the weights of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    out: Annotated[Path, typer.Option(help="The directory of the exported model; must not exist, or be empty.")],
    step: Annotated[int | None, typer.Option(help="The update of the checkpoint. Default: the newest one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Data type of the weights: fp32, bf16 or fp16. Default: as save.dtype says.")
    ] = None,
    license_id: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="For the model card, such as apache-2.0.")
    ] = None,
    push: Annotated[str | None, typer.Option(metavar="REPO_ID", help="Upload to this repository of the Hub.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Create the repository as a private one.")] = False,
) -> None:
    """Export the weights of a checkpoint as a model or adapter directory, with tokenizer and model card."""
    from ptft_dist import api

    api.export(run, out, step=step, dtype=dtype, license_id=license_id, push=push, private=private)
