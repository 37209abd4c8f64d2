"""The quality of a model, and its answers to the rows of a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ptft_dist.api.calls import Overrides, Source, as_words, hiding_secrets, quiet_imports
from ptft_dist.api.recipes import load_recipe

if TYPE_CHECKING:
    from ptft_dist.judging.evaluation import Evaluation
    from ptft_dist.judging.harness import HarnessResult
    from ptft_dist.judging.prediction import Predictions


@hiding_secrets
def evaluate(source: Source, overrides: Overrides = (), *, model: str | Path | None = None) -> dict[str, float]:
    """Evaluate a model on the validation rows of a recipe, each once: metrics by name. Writes no files.

    Args:
        model: a model directory or Hub name. Default: the exported model in the recipe's run_dir.

    Raises:
        PtftError: one of the errors in ptft_dist.errors; the message says what to do.
    """
    from ptft_dist.judging.evaluation import evaluate as run
    from ptft_dist.judging.target import Target, run_of
    from ptft_dist.launch.environment import place
    from ptft_dist.reporting.messages import messages

    loaded, here = load_recipe(source, overrides), place()
    name = str(model or Path(loaded.recipe.run_dir) / "model")
    with messages(here.rank):
        return run(Target(name, loaded, run_of(Path(name)), own=False), here).metrics


@hiding_secrets
def evaluate_model(
    model: str | Path,
    source: Source | None = None,
    overrides: Overrides = (),
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    stride: int | None = None,
) -> Evaluation:
    """Evaluate the model of a run, or another one, on the validation rows of a recipe, each once.

    An interrupted evaluation with a file for its result goes on where it was.

    Args:
        model: the directory of a finished run, a model directory, an adapter directory, or a Hub name.
        source: the recipe. Default: that of the run; for a model without a run, with `data`: one that follows from its
            architecture.
        data: a file with validation rows, which replaces data.validation. It is read with the column mapping of the
            recipe's sources.
        out: a JSON file for the result, written atomically by rank 0; FILE.rows.jsonl beside it has a line for each
            example. Default: evaluation.json in the run directory, for a run with its own recipe and rows.
        stride: for task clm, also measure the perplexity of whole documents with a window of data.max_length tokens
            that moves on by this many tokens.

    Raises:
        RecipeError: there is no recipe, or the model does not fit it.
        CheckpointError: there is no model.
        DataError: the data cannot be read.
    """
    quiet_imports()
    from ptft_dist.judging.evaluation import evaluate_model as run
    from ptft_dist.launch.environment import place
    from ptft_dist.reporting.messages import messages

    here = place()
    with messages(here.rank):
        return run(
            model,
            source,
            as_words(overrides),
            here,
            data=None if data is None else Path(data),
            out=None if out is None else Path(out),
            stride=stride,
        )


@hiding_secrets
def evaluate_on_benchmarks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    include: str | Path | None = None,
    out: str | Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
    allow_code: bool = False,
) -> HarnessResult:
    """Evaluate a causal or sequence-to-sequence model on tasks of lm-eval, which must be installed.

    Args:
        model: the directory of a finished run, a model directory, an adapter directory, or a Hub name.
        tasks: names of tasks, groups or tags, such as mmlu or hellaswag, or patterns.
        include: a directory with further task files. Python files that they name are imported.
        out: a JSON file for the result; FILE.rows.jsonl beside it has a line for each row.
        shots: examples before each row. Default: what the task says.
        limit: only this many rows of each task.
        allow_code: allow tasks that run code of the model, such as humaneval. Their scoring runs in processes with
            limits of time and memory, which is no sandbox.

    Raises:
        RecipeError: lm-eval is not installed, a task is unknown, or it runs code and this is not allowed.
        CheckpointError: there is no model that generates text.
        DataError: a task cannot be loaded.
    """
    quiet_imports()
    from ptft_dist.judging.harness import run_harness
    from ptft_dist.reporting.messages import messages

    with messages(0):
        return run_harness(
            model,
            tasks,
            include=None if include is None else Path(include),
            out=None if out is None else Path(out),
            shots=shots,
            limit=limit,
            allow_code=allow_code,
        )


@hiding_secrets
def predict(
    model: str | Path,
    file: str | Path,
    out: str | Path,
    *,
    source: Source | None = None,
    overrides: Overrides = (),
) -> Predictions:
    """Answer each row of a file with a trained model, and write rows and answers in the same order.

    A row gets the field `prediction`: label and probabilities, a tag for each word, a number, a span of the context, or
    a text. An interrupted prediction goes on where it was. On several processes each answers a share of the rows.

    Args:
        model: the directory of a finished run, a model directory, an adapter directory, or a Hub name.
        file: in any format that recipes read, with the columns of the training rows; answers are not needed.
        out: JSON lines (.jsonl) or a table (.csv, .tsv), written atomically by rank 0.
        source: the recipe. Default: that of the run, else one that follows from the architecture.

    Raises:
        RecipeError: the model does not fit the recipe, its task gives no answers, or `out` has another ending.
        CheckpointError: there is no model.
        DataError: the file cannot be read, or rows are invalid.
    """
    from ptft_dist.reporting.output import check_answers_file

    check_answers_file(Path(out))
    quiet_imports()
    from ptft_dist.judging.prediction import predict as run
    from ptft_dist.launch.environment import place
    from ptft_dist.reporting.messages import messages

    here = place()
    with messages(here.rank):
        return run(model, source, as_words(overrides), here, file=Path(file), out=Path(out))
