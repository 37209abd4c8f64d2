"""`ptft data`: look at prepared data before paying for a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at prepared data.", rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Look at prepared data."""


@app.command()
def verify(
    data: Annotated[
        str,
        typer.Argument(metavar="RECIPE|STORE", help="A recipe, or a directory of prepared data (CACHE/stores/...)."),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as data.max_length=1024.")] = None,
) -> None:
    """Read all bytes of prepared data, and compare them with their checksums."""
    from ptft_dist import api

    for store, size_bytes in api.verify_data(data, overrides or []):
        print(f"{store}: {size_bytes / 1e6:,.1f} MB, unchanged")


@app.command()
def inspect(
    data: Annotated[
        str,
        typer.Argument(metavar="RECIPE|STORE", help="A recipe, or a directory of prepared data (CACHE/stores/...)."),
    ],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as data.max_length=1024.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write one HTML page, which needs no network.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Number of rows to show as text.")] = 5,
) -> None:
    """Show what the data are: sources, languages, lengths, packing, decoded rows, and what each step dropped.

    Prepares the data if necessary.
    """
    from ptft_dist import api
    from ptft_dist.pages.data_page import text_of, write_page

    inspection = api.inspect_data(data, overrides or [], samples=samples)
    print(text_of(inspection))
    if html is not None:
        print(f"\npage: {write_page(inspection, html)}")
