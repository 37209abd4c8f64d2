"""`ptft merge`: fold an adapter into its base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    run: Annotated[Path, typer.Argument(help="A run directory, or an adapter directory.")],
    out: Annotated[Path, typer.Option(help="The directory of the merged model; must not exist, or be empty.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="fp32, bf16 or fp16. Default: bf16 if the base was quantized, otherwise that of the base."),
    ] = None,
) -> None:
    """Fold an adapter into its base, and check that the logits agree. Writes a plain model directory."""
    from ptft_dist import api

    api.merge(run, out, dtype=dtype)
