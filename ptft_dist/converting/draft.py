"""A configuration of another trainer, and the recipe that becomes of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from ptft_dist.config.document import Document
from ptft_dist.config.other_trainers import foreign_names
from ptft_dist.errors import RecipeError

_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?([eE][-+]?\d+)?")
_TEXTS = ("name", "revision", "dir", "path")
"""Ends of names whose values are texts, even if they look like numbers."""
_INCLUDED = {"trl": "transformers", "llamafactory": "transformers"}
"""Trainers that also have the names of another one."""


@cache
def trainers() -> dict[str, Any]:
    """The contents of trainers.yaml."""
    text = Path(__file__).with_name("trainers.yaml").read_text("utf-8")
    contents: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return contents


@dataclass
class Draft:
    """A recipe that is being made."""

    path: Path
    """The file that is converted."""
    given: Mapping[str, Any]
    """Its keys and values, without nulls."""
    trainer: str
    """Whose keys they are: transformers, trl, llamafactory or axolotl."""
    task: str
    tasks: Sequence[str]
    """The names of all tasks."""
    roles: Sequence[str]
    """The roles of the task's columns; empty for tasks on documents."""
    without_dropout: bool
    """Whether the task turns dropout off."""
    processes: int
    """Number of processes of the training that is converted."""
    folder: Path
    """The directory of the recipe, where relative data paths start."""
    values: dict[str, Any] = field(default_factory=dict)
    """The recipe, nested."""
    remarks: list[str] = field(default_factory=list)
    """Differences that no key of the file shows."""
    launch: str = ""
    """The shipped launch config that fits; may be empty."""

    @property
    def defaults(self) -> dict[str, Any]:
        """Name -> the value that the trainer takes if it is not given."""
        by_task = trainers()["task_defaults"].get(self.trainer, {}).get(self.task, {})
        return {**trainers()["defaults"][self.trainer], **by_task}

    def value(self, name: str) -> Any:
        """The value of a setting, by any of its names; the trainer's default if it is not given; None if there is
        none."""
        names = foreign_names()[name].names
        for values in (self.given, self.defaults):
            for each in names:
                if each in values:
                    return values[each]
        return None

    def own(self, name: str) -> Any:
        """The value of exactly this name."""
        return self.given.get(name, self.defaults.get(name))

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained."""
        return bool(self.own("use_peft")) or "lora" in f"{self.own('adapter')} {self.own('finetuning_type')}"

    @property
    def bits(self) -> int:
        """Bits of the quantized weights; 0: they are not quantized."""
        if self.own("load_in_4bit") or self.own("adapter") == "qlora":
            return 4
        return 8 if self.own("load_in_8bit") else int(self.own("quantization_bit") or 0)

    @property
    def precision(self) -> str:
        """Of the computation: bf16, fp16 or fp32."""
        for name in ("fp16", "bf16"):
            if self.own(name) in (True, "auto", "full"):
                return name
        return str(self.own("mixed_precision") or "fp32").replace("no", "fp32")

    @property
    def rows(self) -> int:
        """Rows of an update, over all processes."""
        micro, accumulation = self.value("per_device_train_batch_size"), self.value("gradient_accumulation_steps")
        if self.trainer == "axolotl" and (of_process := self.own("batch_size")):
            accumulation = max(of_process // micro, 1)
        return int(micro * accumulation * self.processes)

    def set(self, key: str, value: Any) -> None:
        """Set a dotted key. An empty section keeps what is there."""
        section = self.values
        *parts, last = key.split(".")
        for part in parts:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        if not (value == {} and isinstance(section.get(last), dict)):
            section[last] = value

    def has(self, key: str) -> bool:
        """Whether a dotted key is set."""
        value: Any = self.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value is not None


def read_given(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML or JSON file, without nulls and private names; numbers in quotes are numbers.

    Raises:
        RecipeError: the file cannot be read, is no mapping, or is a recipe already.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    document = Document()
    document.read(text)
    if document.mistakes:
        raise RecipeError("\n".join(f"{path}:{mistake.line}: {mistake.text}" for mistake in document.mistakes))
    if not isinstance(document.values, dict):
        raise RecipeError(f"{path}: expected the keys and values of a training, as YAML or JSON")
    if "task" in document.values and isinstance(document.values.get("model"), dict):
        raise RecipeError(f"{path}: this is a recipe already; check it with: ptft config check {path}")
    return {
        name: value if name.endswith(_TEXTS) else _number(value)
        for name, value in document.values.items()
        if value is not None and value != "" and not name.startswith("_")
    }


def _number(value: Any) -> Any:
    if not isinstance(value, str) or not _NUMBER.fullmatch(value):
        return value
    return int(value) if value.lstrip("+-").isdecimal() else float(value)


def recognize(path: Path, given: Mapping[str, Any]) -> str:
    """Whose keys these are: the trainer that knows most of them.

    Raises:
        RecipeError: no trainer knows two of them.
    """
    counts = dict.fromkeys(trainers()["names"], 0)
    for name in given:
        for trainer in _trainers_of(name):
            counts[trainer] += 1
    best = max(counts, key=lambda trainer: counts[trainer])  # of equal counts the first
    if counts[best] < 2:
        raise RecipeError(
            f"{path}: its keys are neither those of TrainingArguments, TRL, axolotl nor LLaMA-Factory: "
            f"{', '.join(list(given)[:8])}. Give the file with the settings of the training"
        )
    return best


def _trainers_of(name: str) -> Iterator[str]:
    setting = foreign_names().get(name)
    for trainer in trainers()["names"] if setting is not None else ():
        if setting is not None and (trainer in setting.of or _INCLUDED.get(trainer) in setting.of):
            yield trainer


def task_of(trainer: str, given: Mapping[str, Any]) -> str | None:
    """The task that the keys show: stage or rl, a key that only one task has, or the trainer's usual one."""
    for name in given:
        setting = foreign_names().get(name)
        if setting is not None and setting.keys == ("task",) and given[name] in setting.values:
            return str(setting.values[given[name]])
    shown = [setting.task for name in given if (setting := foreign_names().get(name)) and setting.task]
    types = [trainers()["types"].get(str(each.get("type")), {}) for each in _list(given.get("datasets"))]
    shown += [each["task"] for each in types if "task" in each and len(types) == 1]
    return shown[0] if shown else trainers()["task"].get(trainer)


def _list(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
