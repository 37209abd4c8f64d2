"""A configuration of transformers, TRL, axolotl or LLaMA-Factory as a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptft_dist.config.document import Document
from ptft_dist.config.load import to_yaml
from ptft_dist.config.other_trainers import foreign_names
from ptft_dist.config.recipe import Recipe
from ptft_dist.converting import model_rules, training_rules  # noqa: F401  # they register their rules
from ptft_dist.converting.draft import Draft, read_given, recognize, task_of, trainers
from ptft_dist.converting.rules import Outcome, outcome_of
from ptft_dist.errors import RecipeError

_FIRST = ("task", "model", "tokenizer", "data")
_LAST = ("batch", "optim", "train", "eval", "save", "log", "run_dir")
_UNKNOWN = "ptft does not know this name"


@dataclass(frozen=True)
class Converted:
    """A converted configuration."""

    trainer: str
    """Whose configuration it was."""
    task: str
    text: str
    """The recipe as YAML, with comments."""
    converted: dict[str, str]
    """Key of the file -> the keys and values of the recipe that it set."""
    defaults: dict[str, str]
    """The same for keys that the file did not give, of which the trainer has another default."""
    lost: dict[str, str]
    """Key of the file -> why it has no counterpart."""
    remarks: list[str]
    launch: str
    """The shipped launch config that fits; may be empty."""


def convert(
    path: Path,
    out: Path,
    schema: type[Recipe],
    *,
    task: str | None = None,
    processes: int = 1,
    overrides: Sequence[str] = (),
) -> Converted:
    """Convert a file.

    Args:
        out: where the recipe will be written: its relative data paths start there.
        task: what the file trains, if its keys do not say it.
        processes: the number of processes of that training, which is a factor of the batch size.
        overrides: `key=value` of the recipe, such as a path of the model.

    Raises:
        RecipeError: the file cannot be read, is of no known trainer, or does not say its task.
    """
    given = read_given(path)
    trainer = recognize(path, given)
    tasks = schema.task_sections()
    chosen = task or task_of(trainer, given)
    if chosen is None:
        raise RecipeError(
            f"{path}: {trainers()['names'][trainer]} do not say the task; name it with --task, one of "
            f"{', '.join(tasks)}"
        )
    if chosen not in tasks:
        raise RecipeError(f"--task: there is no task {chosen}; the tasks are {', '.join(tasks)}")
    draft = Draft(
        path,
        given,
        trainer,
        chosen,
        list(tasks),
        tasks[chosen].roles,
        tasks[chosen].without_dropout,
        processes,
        out.parent,
    )
    draft.set("task", chosen)
    converted, lost = _take(draft, given)
    implied, _ = _take(draft, {name: value for name, value in draft.defaults.items() if not _given(name, given)})
    _complete(draft, converted, lost)
    if tasks[chosen].rollout_prompts is not None and draft.values.get("data", {}).pop("workers", None) is not None:
        _move("data.workers", converted, lost, f"task {chosen} learns from its own responses, which no process loads")
    document = Document(values=draft.values)
    for assignment in overrides:
        document.override(assignment)
    if document.mistakes:
        raise RecipeError("\n".join(mistake.text for mistake in document.mistakes))
    text = _text(draft, lost)
    return Converted(trainers()["names"][trainer], chosen, text, converted, implied, lost, draft.remarks, draft.launch)


def _given(name: str, given: Mapping[str, Any]) -> bool:
    return any(each in given for each in foreign_names()[name].names)


def _take(draft: Draft, named: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Set what these keys say. Returns what each has set, and why others have set nothing."""
    converted, lost = {}, {}
    for name, value in named.items():
        setting = foreign_names().get(name)
        try:
            outcome: Outcome = _UNKNOWN if setting is None else outcome_of(draft, name, value, setting)
        except (TypeError, ValueError, AttributeError, LookupError):
            outcome = f"its value {_short(value)} is not one that ptft understands"
        if isinstance(outcome, str):
            lost[name] = outcome
            continue
        for key, each in outcome.items():
            draft.set(key, each)
        converted[name] = ", ".join(f"{key}: {_short(each)}" for key, each in outcome.items()) or "so it is here anyway"
    return converted, lost


def _short(value: Any) -> str:
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _move(keys: str, converted: dict[str, str], lost: dict[str, str], why: str) -> None:
    """Say of the names that set keys with this beginning that they have no counterpart."""
    for name in [name for name, text in converted.items() if text.startswith(keys)]:
        del converted[name]
        lost[name] = why


def _complete(draft: Draft, converted: dict[str, str], lost: dict[str, str]) -> None:
    """Remove what would have no effect, and add what a recipe needs."""
    learned = foreign_names()["assistant_only_loss"].keys_for(draft.task, draft.tasks)
    if draft.trainer == "trl" and learned and not draft.own("assistant_only_loss") and not draft.has(learned[0]):
        draft.remarks.append(
            f"assistant_only_loss: without it, TRL learns all tokens of conversations; {learned[0]}: all does the same"
        )
    if not draft.has("data.validation"):
        draft.values.pop("eval", None)
        _move("eval.", converted, lost, "there are no validation data; set data.validation")
    if not draft.has("eval.every") and draft.values.get("save", {}).pop("best", None):
        draft.values["save"].pop("export", None)
        _move("save.best", converted, lost, "it needs data.validation and eval.every")
    if draft.has("tokenizer") and not draft.has("tokenizer.path") and draft.has("model.path"):
        draft.set("tokenizer.path", draft.values["model"]["path"])
    if draft.values.get("optim", {}).get("schedule") in ("constant", "inverse_sqrt"):
        draft.values["optim"].pop("min_lr_ratio", None)
    adapt = draft.values.get("model", {}).get("adapt", {})
    if "adapter" in adapt:
        draft.values["model"]["adapt"] = {"adapter": adapt["adapter"]}  # it has its own settings
    for key in [key for key, value in draft.values.items() if value == {}]:
        del draft.values[key]


def _text(draft: Draft, lost: Mapping[str, str]) -> str:
    """The recipe with comments on what was left out."""
    middle = [key for key in draft.values if key not in (*_FIRST, *_LAST)]
    ordered = {key: draft.values[key] for key in (*_FIRST, *middle, *_LAST) if key in draft.values}
    name = trainers()["names"][draft.trainer]
    lines = [
        f"# Converted from {draft.path.name} ({name}) for {draft.processes} process{'es' * (draft.processes > 1)}."
    ]
    if lost:
        lines.append("# Without counterpart:")
        lines += [f"#   {key}: {' '.join(why.split())}" for key, why in lost.items()]
    lines += [f"# Note: {remark}" for remark in draft.remarks]
    return "\n".join([*lines, to_yaml(ordered)])
