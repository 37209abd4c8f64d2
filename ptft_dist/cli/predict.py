"""`ptft predict`: the answers of a trained model to the rows of a file."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ptft_dist.cli.evaluate import split_words
from ptft_dist.cli.ranks import LAUNCH, PROCESSES, end_at_signal, launched, run_as_rank

if TYPE_CHECKING:
    from ptft_dist.judging.prediction import Predictions


def predict(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run directory, a model or adapter directory, or a Hub name.")
    ],
    file: Annotated[Path, typer.Option(help="Rows with the columns of the training rows; answers are not needed.")],
    out: Annotated[Path, typer.Option(help="The rows with their answers: a .jsonl file, or a table (.csv or .tsv).")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="The recipe; default: that of the run. Values to set."),
    ] = None,
    launch: Annotated[str | None, typer.Option(help=LAUNCH)] = None,
    processes: Annotated[int | None, typer.Option(min=1, help=PROCESSES)] = None,
) -> None:
    """Answer each row of a file: a label with probabilities, a tag for each word, a number, a span, or a text.

    With --launch or --processes, or under `accelerate launch -m ptft_dist predict ...`, each process answers a share of
    the rows. The same command goes on with an interrupted prediction.
    """
    from ptft_dist import api
    from ptft_dist.reporting.output import check_answers_file

    check_answers_file(out)
    arguments = ["predict", model, *(words or []), "--file", str(file), "--out", str(out)]
    if (code := launched(launch, processes, arguments)) is not None:
        raise typer.Exit(code)
    recipe, overrides = split_words(words or [])
    call = partial(api.predict, model, file, out, source=recipe, overrides=overrides)
    run_as_rank(call, _show, Path(model), partial(end_at_signal, "during the prediction; the same command goes on"))


def _show(result: Predictions) -> None:
    print(f"{result.rows:,} rows in {result.out}" + (f", {result.unanswered:,} unanswered" * bool(result.unanswered)))
