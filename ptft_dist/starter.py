"""A first recipe for a file of data, for `ptft init --data`: task, columns and sizes follow from the rows."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ptft_dist.config.load import to_yaml
from ptft_dist.config.recipe import Recipe, Source
from ptft_dist.config.shipped import shipped
from ptft_dist.config.task_settings import DocumentSettings, TaskSettings
from ptft_dist.data.encoder import RowError
from ptft_dist.data.survey import MOST_ROWS, Column, Survey, counted, quantile
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.launch.local import default_launch
from ptft_dist.tasks.common.chat_settings import ChatSettings
from ptft_dist.tasks.proposals import NEEDS, Fit, fitting_tasks
from ptft_dist.tasks.registry import encoder_class

_HELD_OUT = ("dev", "valid", "validation", "val", "eval", "test")
"""Names of files beside the data that are taken for validation, the first one found."""
_LONGEST = 1024
_SPECIAL = 16  # tokens of a chat template, or around a text
_SYSTEM = 48  # more, for the system message that a chat model's template may begin with
_COVERED = 0.98
"""The share of the rows that data.max_length does not truncate."""
_TOKENS = {"cpu": 4096, "multi_gpu": 32768}  # of one forward pass
_EPOCHS = 3
_EVALUATIONS = 5
_FEWEST_UPDATES = 5  # of a pass over the rows
_MOST_AT_ONCE = 32  # rows of an update
_MADE_BY = re.compile(r"runs/(\w+)/model")
_FEWEST_ROWS = 50  # with a validation set
_FINE_TUNING = {"name": "adamw", "lr": 2e-5, "weight_decay": 0.01, "schedule": "linear", "warmup": 0.1}


@dataclass(frozen=True)
class Start:
    """A recipe for a file, and what was seen in it."""

    task: str
    text: str
    """The recipe, with comments."""
    seen: list[str]
    """Lines about the rows."""
    others: list[str]
    """Other tasks that fit the columns."""
    first: list[str]
    """Shipped recipes to train first: they make the networks that the recipe names."""


def start_for(
    seen: Survey, schema: type[Recipe], folder: Path, *, task: str | None = None, model: str | None = None
) -> Start:
    """A recipe for what a survey has seen.

    Args:
        folder: the directory of the recipe, where its relative data paths start.
        task: None: the most likely one.
        model: a pretrained network; None: that of the shipped recipe of the task.

    Raises:
        DataError: the columns do not fit the task, or no task.
        RecipeError: the task is evaluated only.
    """
    fits = fitting_tasks(seen)
    if task is not None and not schema.task_sections()[task].trains:
        raise RecipeError(f"{task}: it is evaluated only: ptft evaluate MODEL RECIPE")
    chosen = task or next(iter(fits), None)
    if chosen is None or chosen not in fits:
        raise DataError(_no_fit(seen, task, list(fits)))
    draft = _Draft(seen, chosen, fits[chosen], schema.task_sections()[chosen], folder, model)
    others = [each for each in fits if each != chosen]
    bad = draft.bad_rows()
    lines = _seen(seen, fits[chosen], draft.settings)
    if bad:
        lines.append(f"{len(bad):,} rows cannot be used and are skipped, such as {bad[0]}")
    return Start(chosen, draft.text(skip=bool(bad)), lines, others, draft.first())


def _no_fit(seen: Survey, task: str | None, fits: list[str]) -> str:
    has = ", ".join(f"{each.name} ({each.kind})" for each in seen.columns.values())
    needs = {tasks: columns for tasks, columns in NEEDS.items() if task is None or task in tasks.split(", ")}
    lines = [f"  {tasks}: {columns}" for tasks, columns in needs.items()]
    what = f"the columns do not fit task {task}" if task else "the columns fit no task"
    hint = f"\nThey fit: {', '.join(fits)}." if fits else "\nRename columns, or map them with data.train.0.fields."
    return "\n".join([f"{seen.pattern}: {what}; they are {has}. Needed:", *lines]) + hint


@dataclass(frozen=True)
class _Draft:
    """The sections of a recipe, each with comments."""

    survey: Survey
    task: str
    fit: Fit
    settings: TaskSettings
    """The defaults of the task."""
    folder: Path
    model: str | None

    def bad_rows(self) -> list[str]:
        """The rows that the task cannot use, each with its place and the reason."""
        if isinstance(self.settings, DocumentSettings):
            return []
        encoder, settings = encoder_class(self.task), type(self.settings).model_validate(self.fit.settings)
        found: list[str] = []
        source = Source.model_validate(self._source(self.survey.pattern) | {"path": self.survey.pattern})
        for record in islice(encoder.read(settings, source, Path()), MOST_ROWS):
            try:
                encoder.check(settings, record)
            except RowError as error:
                found.append(f"{record.where}: {error}")
        return found

    def text(self, *, skip: bool) -> str:
        """The recipe as YAML. skip: with data.bad_rows: skip."""
        base = _shipped_recipe(self.task, type(self.settings))
        length = self._max_length(base)
        model, about_model = self._network(base, length)
        sections: list[tuple[str, dict[str, Any]]] = [
            ("", {"task": self.task}),
            (about_model, {"model": model}),
            ("", {} if self.model else _taken(base, "tokenizer")),
            (self._about_data(length), {"data": self._data(length) | ({"bad_rows": "skip"} if skip else {})}),
        ]
        own = {**self._of_rollouts(base), **self.fit.settings}
        steps, precision = self._steps(base, length), "bf16" if _gpus() else "fp32"
        sections.append(("", {self.task: own} if own else {}))
        sections += [
            (
                "global_size: rows of an update over all processes. micro_size: rows of a forward pass; halve it when "
                "memory runs out.",
                {"batch": self._batch(base, length)},
            ),
            ("", {"optim": _FINE_TUNING} if self.model else _taken(base, "optim")),
            (self._about_train(), {"train": {"max_steps": steps, "seed": 0, "precision": precision}}),
        ]
        every = max(1, steps // _EVALUATIONS)
        if self._validation() is not None:
            sections.append(("In updates.", {"eval": {"every": every}}))
        sections += [("", {"save": {"every": every, "keep": 2}}), ("", {"run_dir": f"runs/{self.task}"})]
        command = f"ptft init {self.task} --data {self.survey.pattern}" + (
            f" --model {self.model}" if self.model else ""
        )
        blocks = [f"# Written by: {command}\n# All keys: ptft config show {self.task}.yaml; docs/tasks.md\n"]
        for comment, values in sections:
            if values:
                blocks.append((f"# {comment}\n" if comment else "") + to_yaml(values))
        return "".join(blocks)

    # --- sections -----------------------------------------------------------------------------------------------------

    def _network(self, base: Mapping[str, Any], length: int) -> tuple[dict[str, Any], str]:
        if self.model:
            return {
                "path": self._from_recipe(self.model) if Path(self.model).is_dir() else self.model
            }, "A pretrained network; model.adapt: lora trains an adapter instead of all of it."
        model = dict(base["model"])
        if "config" not in model:
            return model, f"The network to start from: a directory or a Hub name. {self._first_steps(base)}".rstrip()
        config = dict(model["config"])
        rows = length * self.settings.texts_per_row
        if "max_position_embeddings" in config:
            config["max_position_embeddings"] = max(config["max_position_embeddings"], rows)
        comment = (
            "A small network with random weights, to try things. Better: a pretrained one, `model: {path: NAME}`\n"
            "# of a directory or of the Hub; then remove the section tokenizer, and set optim.lr to 2e-5."
        )
        return {"config": config}, comment

    def _max_length(self, base: Mapping[str, Any]) -> int:
        """Enough for nearly all rows; a multiple of 16."""
        if isinstance(self.settings, DocumentSettings):
            wanted = 2 * sum(self._column(name).at_quantile(0.5) for name in self.fit.texts)
            return min(512, max(128, _rounded(wanted)))
        special = _SPECIAL + (_SYSTEM if self.model and isinstance(self.settings, ChatSettings) else 0)
        length = min(self._positions(base), _rounded(quantile(self._totals(), _COVERED) + special))
        while list(self.settings.length_problems(length)):
            length += 16
        return length

    def _positions(self, base: Mapping[str, Any]) -> int:
        """The longest row that the network of the shipped recipe can read."""
        made_by = _MADE_BY.fullmatch(str(base["model"].get("path", "")))
        if self.model or made_by is None:
            return _LONGEST
        positions: int = _read_shipped(made_by[1])["model"]["config"]["max_position_embeddings"]
        response = base.get(base["task"], {}).get("sampling", {}).get("max_new_tokens", 0)
        return (positions - response) // 16 * 16

    def _column(self, name: str) -> Column:
        return self.survey.columns[name]

    def first(self) -> list[str]:
        """The shipped recipes that make the networks that this recipe names."""
        base = _shipped_recipe(self.task, type(self.settings))
        named = [] if self.model else _MADE_BY.findall(str(base["model"]))
        return named + _MADE_BY.findall(str(self._of_rollouts(base)))

    def _first_steps(self, base: Mapping[str, Any]) -> str:
        made_by = _MADE_BY.fullmatch(str(base["model"]["path"]))
        return f"`ptft train {made_by[1]}` makes this one, to try things." if made_by else ""

    def _about_data(self, length: int) -> str:
        if isinstance(self.settings, DocumentSettings):
            return "Longer documents continue in the next row of max_length tokens."
        longer = sum(total > length for total in self._totals()) / self.survey.rows
        what = "dropped" if self._drops else "truncated"
        return f"max_length: tokens of a row. By an estimate from their words, {longer:.0%} of the rows are {what}."

    @property
    def _drops(self) -> bool:
        """Whether longer rows are dropped."""
        return getattr(self.settings, "too_long", "") == "drop"

    def _totals(self) -> list[int]:
        """Estimated tokens of each row."""
        columns = (self._column(name).tokens for name in (*self.fit.texts, *self.fit.optional))
        return [sum(counts) for counts in zip(*columns, strict=True)]

    def _data(self, length: int) -> dict[str, Any]:
        validation = self._validation()
        held_out = {} if validation is None else {"validation": validation}
        return {"train": [self._source(self.survey.pattern)], **held_out, "max_length": length}

    def _from_recipe(self, path: str) -> str:
        """A path as the recipe names it: a relative one starts at the recipe's directory."""
        return path if Path(path).is_absolute() else os.path.relpath(path, self.folder)

    def _source(self, path: str) -> dict[str, Any]:
        source: dict[str, Any] = {"path": self._from_recipe(path)}
        if self.survey.unit is not None:
            source["document"] = self.survey.unit
        if isinstance(self.settings, DocumentSettings):
            column = self.fit.fields["text"]
            return source | ({"field": column} if column != "text" else {})
        return source | ({"fields": self.fit.renamed} if self.fit.renamed else {})

    def _validation(self) -> Any:
        """A file beside the data, or a fraction; None for a few rows."""
        if len(self.survey.files) == 1:
            file = self.survey.files[0]
            stem, dot, suffix = file.name.partition(".")
            for name in _HELD_OUT if "train" in stem else ():
                other = file.with_name(stem.replace("train", name) + dot + suffix)
                if other.is_file():
                    return [self._source(str(Path(self.survey.pattern).with_name(other.name)))]
        rows = self.survey.rows
        if rows < _FEWEST_ROWS:
            return None
        return 0.1 if rows < 5_000 else 0.05 if self.survey.complete else 0.02

    def _rows(self, length: int) -> int:
        """Rows of max_length tokens, or those that are not dropped."""
        if isinstance(self.settings, DocumentSettings):
            return sum(self._totals()) // length
        return sum(total <= length or not self._drops for total in self._totals())

    def _batch(self, base: Mapping[str, Any], length: int) -> dict[str, int]:
        """Sizes for this machine. A rollout keeps those of the shipped recipe as far as there are prompts for them."""
        if self.settings.rollout_prompts is not None:
            own: Any = type(self.settings).model_validate({**self._of_rollouts(base), **self.fit.settings})
            size = math.gcd(base["batch"]["global_size"], own.responses)
            return {**base["batch"], "global_size": size, "micro_size": min(8, size)}
        room = _TOKENS[default_launch()] // (length * self.settings.texts_per_row)
        wanted = min(_MOST_AT_ONCE, _power_of_two(self._rows(length) // _FEWEST_UPDATES))
        processes = max(1, _gpus())
        micro = min(_power_of_two(room), max(1, wanted // processes))
        return {"global_size": max(1, wanted // (micro * processes)) * micro * processes, "micro_size": micro}

    def _steps(self, base: Mapping[str, Any], length: int) -> int:
        """Updates of a few passes over the rows."""
        if self.settings.rollout_prompts is not None:
            own: Any = type(self.settings).model_validate({**self._of_rollouts(base), **self.fit.settings})
            updates = own.updates_of_rollout(self._batch(base, length)["global_size"])
            return max(1, self.survey.rows // own.prompts) * updates
        return max(1, _EPOCHS * self._rows(length) // self._batch(base, length)["global_size"])

    def _about_train(self) -> str:
        if self.settings.rollout_prompts is not None:
            return "max_steps: about one pass over the prompts."
        more = "" if self.survey.complete else ", as far as they were read"
        return f"max_steps: about {_EPOCHS} passes over the rows{more}. Or instead: epochs: {_EPOCHS}"

    def _of_rollouts(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The section of the shipped recipe, for a task that needs rewards."""
        if self.settings.rollout_prompts is None:
            return {}
        own = base.get(self.task, {}) or base.get(base["task"], {})
        found = {key: value for key, value in own.items() if key in type(self.settings).model_fields and key != "shape"}
        learned = self.survey.rows if self._validation() is None else self.survey.rows * 9 // 10
        return found | {"prompts": min(found.get("prompts", self.settings.rollout_prompts), _power_of_two(learned))}


def _taken(base: Mapping[str, Any], section: str) -> dict[str, Any]:
    return {section: base[section]} if section in base else {}


def _power_of_two(number: int) -> int:
    """The largest power of two up to a number, at least 1."""
    return 2 ** (max(1, number).bit_length() - 1)


def _rounded(tokens: int) -> int:
    return 16 * -(-tokens // 16)


def _gpus() -> int:
    """NVIDIA GPUs of this machine."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _read_shipped(name: str) -> dict[str, Any]:
    path = shipped("recipes") / f"{name}.yaml"
    contents: dict[str, Any] = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    return contents


def _shipped_recipe(task: str, settings: type[TaskSettings]) -> dict[str, Any]:
    """The shipped recipe of a task, or of one with related settings."""
    if (shipped("recipes") / f"{task}.yaml").is_file():
        return _read_shipped(task)
    for parent in settings.__mro__[1:]:
        siblings: list[type[TaskSettings]] = parent.__subclasses__() if issubclass(parent, TaskSettings) else []
        for sibling in siblings:
            name = getattr(sibling, "section", "")
            if name and (shipped("recipes") / f"{name}.yaml").is_file():
                return _read_shipped(name)
    raise AssertionError(f"no shipped recipe is like {task}")


def _seen(survey: Survey, fit: Fit, settings: TaskSettings) -> list[str]:
    """What was seen, as lines of text."""
    many = f"{survey.rows:,} rows" if survey.complete else f"more than {survey.rows:,} rows; the first ones were read"
    files = f", {len(survey.files)} files" if len(survey.files) > 1 else ""
    unit = f", each a {survey.unit}" if survey.unit else ""
    lines = [f"{survey.pattern}: {many}{files}{unit}"]
    languages = survey.languages(fit.texts)
    texts = languages.total()
    known = [f"{code} {count / texts:.0%}" for code, count in languages.most_common(3) if count >= 0.01 * texts]
    lines.append(f"languages: {', '.join(known)}")
    roles = {column: role for role, column in fit.fields.items()} | {name: name for name in fit.optional}
    rest = " (not used)" if settings.rollout_prompts is None else " (for reward functions)"
    for column in survey.columns.values():
        used = f" -> {roles[column.name]}" if column.name in roles else rest
        lines.append(f"column {column.name}: {_described(column, survey.rows, column.name == fit.label)}{used}")
    return lines


def _described(column: Column, rows: int, is_label: bool) -> str:
    parts = [column.kind]
    if column.rows < rows:
        parts.append(f"missing or empty in {rows - column.rows:,} rows")
    if is_label and column.numeric and len(column.values) > 20:
        numbers = sorted(map(float, column.values))
        parts.append(f"from {numbers[0]:g} to {numbers[-1]:g}")
    elif is_label:
        parts.append(", ".join(counted(column.values)))
    elif column.tokens:
        parts.append(f"about {column.at_quantile(0.5)} tokens, 98 % below {column.at_quantile(_COVERED) + 1}")
    return "; ".join(parts)
