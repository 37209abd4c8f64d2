"""`ptft evaluate`: the metrics of a model on validation rows, in this process or as one rank of several."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptft_dist.cli.ranks import end_at_signal
from ptft_dist.launch.ending import end_now

if TYPE_CHECKING:
    from ptft_dist.evaluation import Evaluation
    from ptft_dist.launch.environment import Place

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run directory, a model or adapter directory, or a Hub name.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="The recipe; default: that of the run. Values to set."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A file with rows, instead of data.validation.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the metrics to this JSON file.")] = None,
) -> None:
    """Evaluate a model on the validation rows of a recipe, and print its metrics.

    Works under `accelerate launch -m ptft_dist evaluate ...` too: each process evaluates a share of the rows.
    """
    from ptft_dist import api
    from ptft_dist.launch.environment import place
    from ptft_dist.training.stopping import ending_at_once

    here, (recipe, overrides) = place(), _split(words or [])
    call = partial(api.evaluate_model, model, recipe, overrides, data=data, out=out)
    with ending_at_once(partial(end_at_signal, "during the evaluation; nothing was written")):
        if here.world_size == 1:
            _print(call())
            return
        end_now(_as_rank(call, here, Path(model)))


def _as_rank(call: Callable[[], Evaluation], here: Place, model: Path) -> int:
    """Evaluate as one rank of several; return the exit code. A failure is reported once, by the rank that fails
    first."""
    from ptft_dist.failures import Failures

    failures = Failures(model, here)
    try:
        result = call()
    except Exception as error:
        failures.report_error(error)
        return failures.exit_code
    if here.is_main:
        _print(result)
    return 0


def _split(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, if the first word is one, and the overrides."""
    if words and (Path(words[0]).is_file() or not _OVERRIDE.match(words[0])):
        return words[0], list(words[1:])
    return None, list(words)


def _print(result: Evaluation) -> None:
    width = max(map(len, ("rows", *result.metrics)))
    print(f"{'rows':<{width}}  {result.rows:,}")
    for name, value in result.metrics.items():
        print(f"{name:<{width}}  {value:.6g}")
