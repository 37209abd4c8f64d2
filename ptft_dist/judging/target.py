"""What is judged: a model and its recipe, found from a run, a directory or a Hub name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from ptft_dist.config.load import Loaded, read_recipe, read_resolved
from ptft_dist.config.recipe import Recipe
from ptft_dist.data.cache import HashMemo, cache_root
from ptft_dist.data.tokenizer_files import TokenizerFiles
from ptft_dist.errors import CheckpointError, RecipeError
from ptft_dist.networks.adapt import reading_section
from ptft_dist.networks.facts import labels_of
from ptft_dist.networks.names import adapter_base, directory_or_hub_name, is_adapter, model_of
from ptft_dist.reporting.run_files import TOKENIZER
from ptft_dist.tasks.registry import recipe_class, task_of

RESOLVED = "resolved.yaml"
"""The file of a run directory with the recipe."""
LONGEST = 512
"""data.max_length of a model without a recipe, if it has as many positions."""
BATCH_TOKENS = {True: 16_384, False: 1024}
"""batch.micro_tokens of a model without a recipe, with and without an accelerator; on a CPU more are slower."""


@dataclass(frozen=True)
class Target:
    """A model, and the recipe that says how rows become its inputs."""

    model: str
    """The directory or Hub name."""
    loaded: Loaded
    run_dir: Path | None
    """The run that has exported the model."""
    own: bool
    """The recipe is that of the run, without changes."""

    @property
    def survey(self) -> dict[str, Any]:
        """Properties of the rows that the model was trained on, such as the labels, as far as they are known."""
        if self.run_dir is None:
            return {}
        try:
            report: dict[str, Any] = json.loads((self.run_dir / "data_report.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return dict(report.get("survey", {}))

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer's directory in the run directory."""
        return None if self.run_dir is None else self.run_dir / TOKENIZER

    def tokenizer_directory(self) -> Path:
        """The tokenizer of the run, of the model's directory, or of the recipe. Raises RecipeError."""
        if self.run_dir is not None:
            return self.run_dir / TOKENIZER
        if (Path(self.model) / "tokenizer_config.json").is_file():
            return Path(self.model)
        section = self.loaded.recipe.tokenizer
        if section.path is None:
            raise RecipeError(
                f"{self.model}: it has no tokenizer, and the recipe trains one. Name it with tokenizer={{path: ...}}"
            )
        cache = cache_root(self.loaded.recipe.data.cache_dir, self.loaded.base.absolute())
        files = TokenizerFiles(cache / "tokenizers", HashMemo(cache / "hashes.json"))
        _, directory = files.load(section.path, self.loaded.base, section.revision, section.trust_remote_code)
        return directory

    def for_reading(self, world_size: int) -> Loaded:
        """The recipe with the trained model as its network, for any number of processes.

        An update of the training may not be divisible by them, so the size of an update becomes the smallest possible.
        Micro-batches stay as large.
        """
        recipe, batch = self.loaded.recipe, self.loaded.recipe.batch
        values: dict[str, Any] = {"model": reading_section(recipe.model, self.model)}
        if recipe.settings.rollout_prompts is None:
            sizes = {"global_size": world_size, "global_tokens": None}
            if batch.micro_size is not None:
                sizes["micro_size"] = 1
                size = recipe.eval.micro_size or batch.micro_size
                values["eval"] = recipe.eval.model_copy(update={"micro_size": size})
            values["batch"] = batch.model_copy(update=sizes)
        return replace(self.loaded, recipe=recipe.model_copy(update=values))

    def files(self) -> list[Any]:
        """Names, sizes and times of the model's files: whether they changed since an interruption."""
        folder = Path(self.model)
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        return [self.model, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def find_target(
    model: str | Path, source: str | Path | Mapping[str, Any] | None, overrides: Sequence[str], rows: Path | None
) -> Target:
    """Find the model, and its recipe: the given one, else that of the run, else one that follows from the network.

    Args:
        rows: a file with rows to judge; without one, only a recipe says which.

    Raises:
        RecipeError: there is no recipe.
        CheckpointError: the run has no model.
    """
    given = Path(model)
    run_dir = given if (given / RESOLVED).is_file() else run_of(given)
    name = str(given) if given.is_dir() else directory_or_hub_name(str(model), Path.cwd(), "model")
    if source is None and run_dir is None and rows is None:
        raise RecipeError(
            f"{model}: no run directory (it has no {RESOLVED}), so a recipe is needed, which names the task and the "
            "data: give a RECIPE after the model, or a file with rows"
        )
    if given.is_dir():
        name = str(model_of(given))
    if source is not None:
        recipe = source if isinstance(source, Mapping) else str(source)
        return Target(name, read_recipe(recipe, overrides, recipe_class()), run_dir, False)
    if run_dir is not None:
        return Target(name, read_resolved(run_dir / RESOLVED, recipe_class(), overrides), run_dir, not overrides)
    assert rows is not None
    return Target(name, read_recipe(recipe_of(name, rows), overrides, recipe_class()), None, False)


def run_of(model: Path) -> Path | None:
    """The run directory of an exported model."""
    run_dir = model.parent
    return run_dir if model.name == "model" and (run_dir / RESOLVED).is_file() else None


def recipe_of(model: str, rows: Path) -> dict[str, Any]:
    """A recipe for judging a model that has none, from its config. Raises RecipeError if its task is unknown."""
    base, revision = adapter_base(model) if is_adapter(model) else (model, None)
    if is_adapter(model):
        raise RecipeError(f"{model}: an adapter directory does not say how rows are read. Give a RECIPE after it")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(base, revision=revision)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model}: its config cannot be read: {error}") from None
    source = {"path": str(rows.absolute())}
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = min(LONGEST, positions) if isinstance(positions, int) and positions > 0 else LONGEST
    architecture, labels = str((config.architectures or [""])[0]), labels_of(config)
    multi_label = config.problem_type == "multi_label_classification"
    found = task_of(architecture, labels, multi_label=multi_label)
    if found is None:
        raise RecipeError(
            f"{model}: no task is known for {architecture or 'this network'}. Give a RECIPE after the model"
        )
    task, settings = found
    return {
        "task": task,
        "model": {"path": model},
        "tokenizer": {"path": model},
        "data": {"train": [source], "validation": [source], "max_length": length},
        "batch": {"global_size": 1, "micro_tokens": max(length, BATCH_TOKENS[torch.accelerator.is_available()])},
        "train": {"max_steps": 1, "precision": "fp32"},
        "run_dir": "runs/none",
        **({task: settings} if settings else {}),
    }


def source_of(file: Path, recipe: Recipe) -> dict[str, Any]:
    """A source for a file that is read like the files of a recipe: column mapping, text column, unit of documents."""
    data = recipe.data
    sources = [*(data.validation if isinstance(data.validation, list) else ()), *data.train]
    sources = [each for each in sources if each.source is None]
    source: dict[str, Any] = {"path": str(file.absolute())}
    if fields := next((each.fields for each in sources if each.fields), None):
        source["fields"] = dict(fields)
    key = "document" if ".txt" in file.suffixes else "field"
    if (value := next((each for each in (getattr(s, key) for s in sources) if each is not None), None)) is not None:
        source[key] = value
    return source
