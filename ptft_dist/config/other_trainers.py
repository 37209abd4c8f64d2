"""Names of other trainers (transformers, TRL, axolotl, LLaMA-Factory, peft) and the keys that do the same.

The table is `other_trainers.yaml`. Messages about unknown keys, the page docs/from-other-trainers.md and `ptft convert`
follow from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

PAGE = "docs/from-other-trainers.md"
_TITLE = "# From other trainers\n"
_HEAD = """\
What names of transformers, TRL, axolotl, LLaMA-Factory and peft are called here. An unknown key of a recipe, or of
`key=value` on the command line, that has one of these names is answered with the key. `ptft convert FILE` converts a
whole file, see [convert.md](convert.md). `learning_rate` may stand in any section. This page is generated from
`ptft_dist/config/other_trainers.yaml`.
"""


@dataclass(frozen=True)
class ForeignName:
    """A setting of other trainers: its names, and what does the same here."""

    topic: str
    names: tuple[str, ...]
    of: tuple[str, ...]
    """The trainers that have one of the names. TRL and LLaMA-Factory also have those of transformers."""
    keys: tuple[str, ...]
    """The dotted keys that do the same; those of tasks are alternatives. Empty: there is no counterpart."""
    note: str
    """A sentence: what is different, or what to do instead. May be empty if there is a key."""
    values: dict[Any, Any]
    """Their values -> ours; empty: the same values."""
    how: str
    """The rule of `ptft_dist.converting` that converts it; empty: its value is that of the key."""
    task: str
    """The task that only this name shows; may be empty."""

    def keys_for(self, task: object, tasks: Iterable[str]) -> tuple[str, ...]:
        """The keys without those of other tasks. tasks: the names of all tasks."""
        others = set(tasks) - {task}
        return tuple(key for key in self.keys if key.partition(".")[0] not in others)


def read_table() -> dict[str, Any]:
    """The contents of the table, by topics."""
    table: dict[str, Any] = YAML(typ="safe", pure=True).load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    return table


@cache
def foreign_settings() -> tuple[ForeignName, ...]:
    """The rows of the table, in its order."""
    return tuple(
        _setting(topic, names, fields) for topic, rows in read_table().items() for names, fields in rows.items()
    )


def _setting(topic: str, names: str, fields: dict[str, Any]) -> ForeignName:
    key = fields.pop("key", ())
    keys = (key,) if isinstance(key, str) else tuple(key)
    values = {"note": "", "values": {}, "how": "", "task": "", **fields, "of": tuple(fields["of"])}
    return ForeignName(topic, tuple(names.split(", ")), keys=keys, **values)


@cache
def foreign_names() -> dict[str, ForeignName]:
    """Name -> its setting."""
    return {name: setting for setting in foreign_settings() for name in setting.names}


def foreign_name(word: str, *, typos: bool = False) -> ForeignName | None:
    """The setting with this name, in any spelling of a command line, such as --learning-rate.

    typos: take the nearest name by spelling.
    """
    name = word.lstrip("-").replace("-", "_").lower()
    if typos:
        name = next(iter(get_close_matches(name, foreign_names(), n=1, cutoff=0.85)), name)
    return foreign_names().get(name)


def page() -> str:
    """The text of PAGE."""
    lines = [_TITLE, _HEAD]
    topic = ""
    for each in foreign_settings():
        if each.topic != topic:
            topic = each.topic
            lines += ["\n".join([f"## {topic}", "", "| name | here | |", "|---|---|---|"])]
        names, keys = (", ".join(f"`{word}`" for word in words) for words in (each.names, each.keys))
        lines[-1] += f"\n| {names} | {keys or 'no counterpart'} | {each.note.replace('|', chr(92) + '|')} |"
    return "\n".join(f"{block.rstrip()}\n" for block in lines)
