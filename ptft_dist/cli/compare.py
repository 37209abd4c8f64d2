"""`ptft compare`: tables, and one HTML page, about what differs between runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN ...", help="Run directories. The first is the baseline.")
    ],
    html: Annotated[Path | None, typer.Option(help="Also write one HTML page with the curves of all runs.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this JSON file.")] = None,
) -> None:
    """Compare runs: final and best metrics, recipe keys that differ, and evaluations on the same examples.

    A star marks the best value of a row. After `ptft evaluate RUN` for each run, metrics have confidence intervals, and
    differences from the first run a paired test.
    """
    from ptft_dist import api
    from ptft_dist.pages.tables import lines

    comparison = api.compare(runs, html=html, json_file=json)
    print("\n\n".join("\n".join(lines(table)) for table in comparison.tables()))
    for path in (html, json):
        if path is not None:
            print(f"\nwritten: {path}")
