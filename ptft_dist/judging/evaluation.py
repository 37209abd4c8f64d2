"""Metrics of a trained model on validation rows, row by row and as tables, for `ptft evaluate`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.judging.examples import ExampleResult, RowResults
from ptft_dist.judging.perplexity import StridedPerplexity, count_bytes, perplexity_of
from ptft_dist.judging.target import Target, find_target, source_of
from ptft_dist.launch.environment import Place
from ptft_dist.launch.result import RESULT, read_json
from ptft_dist.reporting.messages import say
from ptft_dist.reporting.output import check_writable, json_line, write_file, write_text
from ptft_dist.reporting.tensorboard import add_evaluation
from ptft_dist.run import libraries_restored
from ptft_dist.session import Session
from ptft_dist.tasks.common.generation import generated_text
from ptft_dist.tasks.common.scores.text import count_words
from ptft_dist.tasks.protocol import Task
from ptft_dist.tasks.registry import encoder_class
from ptft_dist.training.validation import Validation

WORST = 10
"""Examples with the largest losses in the result."""
SHOWN_CHARACTERS = 500
"""Of the text of such an example."""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. Metrics are equal on all ranks; what follows them is known on rank 0 only."""

    model: str
    """The directory or Hub name of the model."""
    recipe: str
    """The path of the recipe."""
    metrics: dict[str, float]
    """By name, such as eval/loss."""
    rows: int
    """Number of validation rows, each of which counts once."""
    examples: int = 0
    """Number of examples; one may have several rows, such as the windows of a context."""
    judged: str = ""
    """A hash of the examples' ids, in order: equal for models that were judged on the same ones."""
    details: dict[str, Any] = field(default_factory=dict)
    """Tables by name: see docs/evaluate.md."""

    def values(self) -> dict[str, Any]:
        """The evaluation as JSON values."""
        return {
            "model": self.model,
            "recipe": self.recipe,
            "metrics": self.metrics,
            "rows": self.rows,
            "examples": self.examples,
            "judged": self.judged,
            "details": self.details,
        }


def evaluate_model(
    model: str | Path,
    source: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str],
    place: Place,
    *,
    data: Path | None,
    out: Path | None,
    stride: int | None = None,
) -> Evaluation:
    """Find the recipe and the model, evaluate, and write the result on rank 0; see api.evaluate_model."""
    if data is not None and not data.is_file():
        raise DataError(f"{data} does not exist. Give a file with validation rows")
    target = find_target(model, source, overrides, data)
    if data is not None:
        words = [
            f"{key}={json.dumps(value)}" for key, value in rows_of(data, target.loaded.recipe, target.survey).items()
        ]
        target = find_target(model, source, [*overrides, *words], data)
    if out is None and target.own and target.run_dir is not None and os.access(target.run_dir, os.W_OK):
        out = target.run_dir / "evaluation.json"
    if out is not None and place.is_main:
        check_writable(out)
    return evaluate(target, place, out=out, stride=stride)


def evaluate(target: Target, place: Place, *, out: Path | None = None, stride: int | None = None) -> Evaluation:
    """Evaluate a model on the recipe's validation rows, each once.

    If the recipe trains its tokenizer, the model of a run gets the tokenizer of the run. With `out`, an interrupted
    evaluation of the same model and rows on as many processes goes on where it was.

    Raises:
        RecipeError: there are no such rows, or the model does not fit the recipe.
    """
    loaded, model = target.loaded, target.model
    if not loaded.recipe.validated:
        raise RecipeError("data.validation: not set, so there are no rows to evaluate; give a fraction, or sources")
    start = loaded.recipe.model
    trained = target.for_reading(place.world_size)
    with libraries_restored(), ExitStack() as at_end:
        session = Session(trained, place, start=start, tokenizer_from=target.tokenizer)
        _check_tokenizer(session.trained.tokenizer, model, loaded.recipe.tokenizer.trust_remote_code)
        windows = None if stride is None else StridedPerplexity(trained, session.trained.tokenizer, stride)
        session.start(training=False)
        validation, engine, task = session.validation, session.engine, session.task
        assert validation is not None
        decode = partial(generated_text, session.trained.tokenizer)
        identity = [target.files(), validation.identity, loaded.recipe.own_values(), place.world_size]
        rows = RowResults(out, identity, place)
        at_end.callback(rows.close)
        scores = validation.score(engine, task, keeper=rows)
        assert scores is not None
        examples = rows.examples(engine, validation.store, encoder_class(loaded.recipe.task).numbered, task, decode)
        details = _details(task, examples, session.trained.tokenizer)
        if windows is not None:
            details["strided_perplexity"] = windows.measure(engine, task, session.layout)
        result = _result(target, scores[0], validation, examples, details)
        if out is not None and place.is_main:
            _write(out, result, examples)
            _add_to_tensorboard(target, result)
            say(f"written to {out}")
        engine.barrier()
        rows.remove()
        engine.close()
    return result


def _result(
    target: Target,
    metrics: Mapping[str, float],
    validation: Validation,
    examples: Sequence[ExampleResult],
    details: dict[str, Any],
) -> Evaluation:
    return Evaluation(
        target.model,
        str(target.loaded.path),
        {f"eval/{name}": value for name, value in metrics.items()},
        len(validation.keys),
        len(examples),
        hashlib.sha256("".join(each.id for each in examples).encode()).hexdigest() if examples else "",
        details,
    )


def _details(task: Task, examples: Sequence[ExampleResult], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The task's tables, the perplexity by token, byte and word, and the examples with the largest mean loss."""
    judged = [each.judged for each in examples if each.judged is not None]
    details = task.details(judged) if judged else {}
    targets = [(*each.values["loss"], *each.targets) for each in examples if each.targets is not None]
    if targets:
        losses, counts, before, ids = zip(*targets, strict=True)
        sizes = [count_bytes(tokenizer, [*a, *b]) - count_bytes(tokenizer, a) for a, b in zip(before, ids, strict=True)]
        details["perplexity"] = perplexity_of(
            sum(losses),
            sum(counts),
            sum(sizes),
            sum(count_words(generated_text(tokenizer, each)) for each in ids),
        )
    with_loss = [
        (each.values["loss"][0] / (each.values["loss"][1] or 1.0), each) for each in examples if "loss" in each.values
    ]
    if with_loss:
        details["worst"] = [
            {"row": each.row, "loss": loss, "text": each.text[:SHOWN_CHARACTERS], **each.shown()}
            for loss, each in sorted(with_loss, key=lambda pair: (-pair[0], pair[1].row))[:WORST]
        ]
    return details


def _check_tokenizer(tokenizer: Any, model: str, trust_remote_code: bool) -> None:
    """Raises RecipeError if the model's directory has a tokenizer that gives other ids for the same tokens."""
    if not (Path(model) / "tokenizer_config.json").is_file():
        return
    loaded = load_tokenizer(model, key="model", trust_remote_code=trust_remote_code)
    own, known = loaded.get_vocab(), tokenizer.get_vocab()
    different = [token for token, i in own.items() if known.get(token, i) != i]
    if different or not own.keys() & known.keys():
        raise RecipeError(
            f"tokenizer: the recipe's tokenizer has other ids for {len(different):,} of the {len(own):,} tokens of the "
            f"model in {model}. Set tokenizer={{path: {model}}} to encode the rows with the tokenizer of the model"
        )


def rows_of(file: Path, recipe: Recipe, survey: Mapping[str, Any]) -> dict[str, Any]:
    """The values that replace the validation rows of a recipe by those of a file, which is read like its sources.

    survey: properties of the rows that the model was trained with. Its labels are kept, because another split has other
    training rows.
    """
    values: dict[str, Any] = {"data.validation": [source_of(file, recipe)], "data.folds": None, "data.fold": None}
    if "labels" in survey and "labels" in type(recipe.settings).model_fields:
        values[f"{recipe.task}.labels"] = list(survey["labels"])
    return values


def _add_to_tensorboard(target: Target, result: Evaluation) -> None:
    """Beside the curves of the run, if its own rows were evaluated and it has any.

    In a folder of its own, because TensorBoard may take a start of the training in the same second for a later one,
    which removes these points.
    """
    if not target.own or target.run_dir is None or not (target.run_dir / "tensorboard").is_dir():
        return
    result_of_run = read_json(target.run_dir / RESULT)
    step = int(result_of_run.get("metrics_step") or result_of_run.get("steps") or 0)  # that of the exported weights
    tables = {name: value for name, value in result.details.items() if name != "worst"}
    add_evaluation(target.run_dir / "tensorboard/evaluate", step, result.metrics, tables)


def _write(out: Path, result: Evaluation, examples: Sequence[ExampleResult]) -> None:
    """Write FILE.json and FILE.rows.jsonl, atomically."""
    rows = ({"row": each.row, "id": each.id, "values": each.values, **each.shown()} for each in examples)
    write_file(out.with_name(f"{out.stem}.rows.jsonl"), map(json_line, rows))
    write_text(out, json.dumps(result.values(), indent=1, ensure_ascii=False) + "\n")
