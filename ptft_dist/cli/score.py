"""`ptft score`: score texts or preference pairs with a reward model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def score(
    run: Annotated[Path, typer.Argument(help="A run directory, a model directory, or an adapter directory.")],
    file: Annotated[Path, typer.Option(help="Rows: pairs (chosen, rejected), conversations or texts.")],
    out: Annotated[Path, typer.Option(help="The rows with their scores, as JSON lines.")],
    shape: Annotated[str | None, typer.Option(help="See reward.shape. Default: as in training.")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of a batch, padding included.")] = 8192,
) -> None:
    """Score each row of a file with a reward model, and print a summary.

    Pairs get score_chosen and score_rejected, other rows get score. Longer texts than the network has positions for are
    truncated, and such a row gets truncated: true.
    """
    from ptft_dist import api

    for name, value in api.score(run, file, out, shape=shape, batch_tokens=batch_tokens).items():
        print(f"{name:<16} {value:,}" if isinstance(value, int) else f"{name:<16} {value:.4f}")
    print(f"scores in {out}")
