"""`ptft report`: one HTML page about a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    html: Annotated[Path | None, typer.Option(help="The page. Default: RUN/report.html.")] = None,
) -> None:
    """Write one HTML page about a run: curves, metrics, samples, data, environment and recipe.

    The page needs no network. `ptft train` writes it at the end of a run.
    """
    from ptft_dist import api

    print(api.report(run, html))
