"""`ptft evaluate`: the metrics of a model on validation rows, in this process or as one rank of several."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptft_dist.cli import harness
from ptft_dist.cli.ranks import LAUNCH, PROCESSES, end_at_signal, launched, run_as_rank
from ptft_dist.errors import RecipeError

if TYPE_CHECKING:
    from ptft_dist.judging.evaluation import Evaluation

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
SHOWN_LABELS = 12
"""A confusion matrix of more labels is in the file only."""


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="RUN|MODEL", help="A run directory, a model or adapter directory, or a Hub name.")
    ],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE] [KEY=VALUE]...", help="The recipe; default: that of the run. Values to set."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="A file with rows, instead of data.validation.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The result as JSON. Default: RUN/evaluation.json, for the run's own rows.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="clm: also the perplexity of whole documents, by a window that moves.")
    ] = None,
    launch: Annotated[str | None, typer.Option(help=LAUNCH)] = None,
    processes: Annotated[int | None, typer.Option(min=1, help=PROCESSES)] = None,
    lm_eval: Annotated[
        str | None, typer.Option(metavar="TASK[,TASK]...", help="Standard benchmarks with lm-eval, without a recipe.")
    ] = None,
    lm_eval_path: Annotated[Path | None, typer.Option(help="A directory with further tasks of lm-eval.")] = None,
    lm_eval_shots: Annotated[int | None, typer.Option(min=0, help="Examples; default: what the task says.")] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(min=1, help="Only this many rows of each task.")] = None,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Allow tasks that run code of the model.")] = False,
) -> None:
    """Evaluate a model on the validation rows of a recipe, and print its metrics and tables.

    With --launch or --processes, or under `accelerate launch -m ptft_dist evaluate ...`, each process evaluates a share
    of the rows. The same command goes on with an interrupted evaluation that writes a file.
    """
    from ptft_dist import api

    recipe, overrides = split_words(words or [])
    at_signal = partial(end_at_signal, "during the evaluation; the same command goes on")
    if lm_eval is not None:
        if words or data is not None or stride is not None or launch or processes:
            raise RecipeError(
                "--lm-eval: a recipe, --data, --stride, --launch and --processes have no effect; give a model and tasks"
            )
        run_as_rank(
            partial(
                api.evaluate_on_benchmarks,
                model,
                [task for task in lm_eval.split(",") if task],
                include=lm_eval_path,
                out=out,
                shots=lm_eval_shots,
                limit=lm_eval_limit,
                allow_code=allow_code,
            ),
            harness.show,
            Path(model),
            partial(end_at_signal, "during the evaluation"),
        )
        return
    if lm_eval_path or lm_eval_shots is not None or lm_eval_limit or allow_code:
        raise RecipeError("--lm-eval-path, --lm-eval-shots, --lm-eval-limit, --allow-code: they need --lm-eval TASK")
    given = {"--data": data, "--out": out, "--stride": stride}
    options = [str(word) for option in given.items() if option[1] is not None for word in option]
    if (code := launched(launch, processes, ["evaluate", model, *(words or []), *options])) is not None:
        raise typer.Exit(code)
    call = partial(api.evaluate_model, model, recipe, overrides, data=data, out=out, stride=stride)
    run_as_rank(call, show, Path(model), at_signal)


def split_words(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """The recipe, if the first word is one, and the overrides."""
    if words and (Path(words[0]).is_file() or not _OVERRIDE.match(words[0])):
        return words[0], list(words[1:])
    return None, list(words)


def show(result: Evaluation) -> None:
    """Print metrics and tables."""
    width = max(map(len, ("rows", *result.metrics)))
    print(f"{'rows':<{width}}  {result.rows:,}")
    for name, value in result.metrics.items():
        print(f"{name:<{width}}  {value:.6g}")
    details = result.details
    for name in ("labels", "questions"):
        if name in details:
            print()
            _table(details[name])
    if "confusion" in details and len(details["confusion"]["labels"]) <= SHOWN_LABELS:
        labels, counts = details["confusion"]["labels"], details["confusion"]["counts"]
        print()
        rows = [
            {"gold \\ predicted": a, **dict(zip(labels, row, strict=True))}
            for a, row in zip(labels, counts, strict=True)
        ]
        _table(rows)
    if "calibration" in details:
        print(f"\nexpected calibration error  {details['calibration']['ece']:.4f}")
    for name in ("perplexity", "strided_perplexity"):
        if name in details:
            print()
            for key, value in details[name].items():
                print(f"{name.replace('_', ' ')}, {key:<14} {value:,.6g}")
    if details.get("worst"):
        print("\nlargest losses")
        for each in details["worst"][:3]:
            print(f"  row {each['row']:,}, loss {each['loss']:.4g}: {_short(each['text'])}")


def _table(rows: Sequence[dict[str, Any]]) -> None:
    """Print rows with the same keys as aligned columns."""
    cells = [list(rows[0])] + [[f"{x:.4f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        first, *others = zip(line, widths, strict=True)
        print("  ".join([f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in others)]))


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 80 else flat[:79] + "…"
