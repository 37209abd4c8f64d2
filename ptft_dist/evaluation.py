"""Metrics of a trained model on validation rows, for `ptft evaluate`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ptft_dist.config.load import Loaded, read_recipe, read_resolved
from ptft_dist.config.recipe import Recipe
from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.errors import DataError, PtftError, RecipeError
from ptft_dist.launch.environment import Place
from ptft_dist.networks.adapt import reading_section
from ptft_dist.networks.names import directory_or_hub_name, model_of
from ptft_dist.reporting.run_files import TOKENIZER
from ptft_dist.run import libraries_restored
from ptft_dist.session import Session
from ptft_dist.tasks.registry import recipe_class

RESOLVED = "resolved.yaml"
"""The file of a run directory with the recipe."""


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation, equal on all ranks."""

    model: str
    """The directory or Hub name of the model."""
    recipe: str
    """The path of the recipe."""
    metrics: dict[str, float]
    """By name, such as eval/loss."""
    rows: int
    """Number of validation rows, each of which counts once."""

    def values(self) -> dict[str, Any]:
        """The evaluation as JSON values."""
        return {"model": self.model, "recipe": self.recipe, "metrics": self.metrics, "rows": self.rows}


def evaluate_model(
    model: str | Path,
    source: str | Path | Mapping[str, Any] | None,
    overrides: Sequence[str],
    place: Place,
    *,
    data: Path | None,
    out: Path | None,
) -> Evaluation:
    """Find the recipe and the model, evaluate, and write the result on rank 0; see api.evaluate_model."""
    run_dir = Path(model)
    resolved = run_dir / RESOLVED
    if source is None and not resolved.is_file():
        raise RecipeError(
            f"{model}: no run directory (it has no {RESOLVED}), so a recipe is needed, which names the task and the "
            "data: ptft evaluate MODEL RECIPE"
        )

    def read(words: Sequence[str]) -> Loaded:
        if source is None:
            return read_resolved(resolved, recipe_class(), words)
        return read_recipe(source if isinstance(source, Mapping) else str(source), words, recipe_class())

    loaded = read(overrides)
    name = str(model_of(run_dir)) if run_dir.is_dir() else directory_or_hub_name(str(model), Path.cwd(), "model")
    if data is not None:
        if not data.is_file():
            raise DataError(f"{data} does not exist. Give a file with validation rows")
        replaced = rows_of(data, loaded.recipe, _survey(run_dir))
        loaded = read([*overrides, *(f"{key}={json.dumps(value)}" for key, value in replaced.items())])
    if out is not None and place.is_main:
        _check_writable(out)
    result = evaluate(loaded, place, name)
    if out is not None and place.is_main:
        _write(out, result)
    return result


def evaluate(loaded: Loaded, place: Place, model: str) -> Evaluation:
    """Evaluate a model on the recipe's validation rows.

    If the recipe trains its tokenizer, a model in a run directory gets the tokenizer of the run.

    Raises:
        RecipeError: there are no such rows, or the model does not fit the recipe.
    """
    if not loaded.recipe.validated:
        raise RecipeError("data.validation: not set, so there are no rows to evaluate; give a fraction, or sources")
    start = loaded.recipe.model
    trained = replace(loaded, recipe=loaded.recipe.model_copy(update={"model": reading_section(start, model)}))
    with libraries_restored():
        session = Session(trained, place, start=start, tokenizer_from=_tokenizer_of_run(Path(model)))
        _check_tokenizer(session.trained.tokenizer, model, loaded.recipe.tokenizer.trust_remote_code)
        session.start(training=False)
        assert session.validation is not None
        scores = session.validation.score(session.engine, session.task)
        assert scores is not None
        session.engine.barrier()
        session.engine.close()
    metrics, _ = scores
    named = {f"eval/{name}": value for name, value in metrics.items()}
    return Evaluation(model, str(loaded.path), named, len(session.validation.keys))


def _tokenizer_of_run(model: Path) -> Path | None:
    """The directory of the tokenizer of the run that has exported a model to its run directory."""
    run_dir = model.parent
    return run_dir / TOKENIZER if model.name == "model" and (run_dir / RESOLVED).is_file() else None


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
    data = recipe.data
    sources = [*(data.validation if isinstance(data.validation, list) else ()), *data.train]
    sources = [each for each in sources if each.source is None]
    source: dict[str, Any] = {"path": str(file.absolute())}
    if fields := next((each.fields for each in sources if each.fields), None):
        source["fields"] = dict(fields)
    key = "document" if ".txt" in file.suffixes else "field"
    if (value := next((each for each in (getattr(s, key) for s in sources) if each is not None), None)) is not None:
        source[key] = value
    values: dict[str, Any] = {"data.validation": [source], "data.folds": None, "data.fold": None}
    if "labels" in survey and "labels" in type(recipe.settings).model_fields:
        values[f"{recipe.task}.labels"] = list(survey["labels"])
    return values


def _survey(run_dir: Path) -> dict[str, Any]:
    """Properties of the training rows of a run, such as the labels; empty without a run."""
    try:
        report: dict[str, Any] = json.loads((run_dir / "data_report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return dict(report.get("survey", {}))


def _check_writable(out: Path) -> None:
    """Create the directory of a file. Raises RecipeError, before an evaluation takes its time."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{out}: cannot be written: {error.strerror}. Name another file") from None
    if out.is_dir():
        raise RecipeError(f"{out}: this is a directory. Name a file, such as {out / 'evaluation.json'}")


def _write(out: Path, evaluation: Evaluation) -> None:
    """Write the evaluation as JSON, atomically. Raises PtftError."""
    unfinished = out.with_name(f".{out.name}.partial")
    try:
        unfinished.write_text(json.dumps(evaluation.values(), indent=1) + "\n", encoding="utf-8")
        unfinished.replace(out)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise PtftError(f"{out}: cannot be written: {error.strerror}. Make room, or name another file") from error
