"""What a value of another trainer is here.

The table of other trainers names a rule (`how`) where a value is not simply copied. The rules are in `model_rules.py`
and `training_rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ptft_dist.config.other_trainers import ForeignName
from ptft_dist.converting.draft import Draft

Outcome = Mapping[str, Any] | str
"""The dotted keys that an entry sets (none: it is so anyway), or why it has no counterpart."""


@dataclass(frozen=True)
class Entry:
    """One key of the file, and its value."""

    draft: Draft
    name: str
    value: Any
    setting: ForeignName
    keys: tuple[str, ...]
    """The keys of the setting for the draft's task."""

    @property
    def key(self) -> str:
        return self.keys[0]


Rule = Callable[[Entry], Outcome]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Decorator: the function is the rule of its name."""
    RULES[function.__name__] = function
    return function


def outcome_of(draft: Draft, name: str, value: Any, setting: ForeignName) -> Outcome:
    """What becomes of one key of the file."""
    keys = setting.keys_for(draft.task, draft.tasks)
    if setting.keys and not keys:
        return f"task {draft.task} has no such setting"
    if keys and keys[0].startswith("model.adapt.lora.") and not draft.adapts:
        return "no adapter is trained"
    entry = Entry(draft, name, value, setting, keys)
    if setting.how:
        return RULES[setting.how](entry)
    if not keys:
        return setting.note.replace("; remove it", "")
    return translated(entry) if setting.values else {keys[0]: value}


def translated(entry: Entry) -> Outcome:
    """The value by the table."""
    if entry.value in entry.setting.values:
        return {entry.key: entry.setting.values[entry.value]}
    return f"there is no {entry.value} here; {entry.key} stays at its default"


def is_true(value: Any) -> bool:
    """Whether a switch is on, as YAML or its trainer writes it."""
    return value is True or value in ("auto", "full", "yes", "true", "unsloth", 1)
