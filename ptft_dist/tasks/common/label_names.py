"""The names of the labels or tags that occur in the data."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ptft_dist.data.class_labels import ClassId
from ptft_dist.data.encoder import RowError
from ptft_dist.data.formats import json_type, text_problem
from ptft_dist.errors import DataError


def label_name(label: Any) -> str:
    """The name of a label. Numbers and booleans are converted to text, such as `3` or `true`. Raises RowError."""
    if isinstance(label, bool):
        return "true" if label else "false"
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if isinstance(label, str) and label.strip():
        if problem := text_problem("label", label):
            raise RowError(problem)
        return label
    if isinstance(label, int):
        return str(label)
    raise RowError(
        f"the label is {json_type(label) if not isinstance(label, str) else 'an empty string'}; a label is a text or a "
        "whole number. For lists of labels, set multi_label: true."
    )


def class_name(value: Any, names: Mapping[str, str]) -> Any:
    """The name of a class that the data have as a number; other values unchanged.

    names: `label_names` of the task's settings, which come before the names of the data set's ClassLabel feature.
    """
    # pandas makes floats of a column of integers with a null.
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    number = str(whole) if isinstance(whole, int | str) and not isinstance(whole, bool) else ""
    if number in names:
        return names[number]
    return value.name if isinstance(value, ClassId) and not names else value


def in_order(names: Iterable[str], label_names: Mapping[str, str], ids: Mapping[str, int]) -> list[str] | None:
    """The labels in the order of label_names, or of the ids of a ClassLabel feature; None if neither has them all.

    ids: name -> number, of the labels that were read as ClassIds.
    """
    if label_names:
        return list(dict.fromkeys(label_names.values()))
    names = list(names)
    return sorted(names, key=lambda name: ids[name]) if ids.keys() >= set(names) else None


def check_known(names: Sequence[str], labels: Collection[str], setting: str) -> None:
    """Raises RowError if a name is none of the labels. setting: the recipe's key that lists them, for the message."""
    if unknown := [name for name in names if name not in labels]:
        raise RowError(
            f"the label {unknown[0]!r} is none of {', '.join(labels)}. Correct it, or list all labels in {setting}."
        )


@dataclass
class LabelNames:
    """Collects the names of labels or tags, and refuses different names that look equal."""

    role: str
    """`label` or `tag`, for messages."""
    setting: str
    """The recipe's key that can list the names."""
    first: dict[str, str] = field(default_factory=dict)
    """Name -> where it first occurs in the data."""
    ids: dict[str, int] = field(default_factory=dict)
    """Name -> number, of names that the data have as ClassIds."""

    def add(self, names: Iterable[str], where: str, values: Iterable[Any] = ()) -> None:
        """values: what the data have; some may be ClassIds."""
        for name in names:
            self.first.setdefault(name, where)
        self.ids |= {value.name: int(value) for value in values if isinstance(value, ClassId)}

    def check_distinct(self) -> None:
        """Check that no two names look equal.

        Raises:
            DataError: two names differ only in white space, or in the Unicode normalization of the same characters.
        """
        seen: dict[str, str] = {}
        for name in sorted(self.first):
            same = seen.setdefault(" ".join(unicodedata.normalize("NFC", name).split()), name)
            if same != name:
                raise DataError(
                    f"data: the {self.role}s {same!a} ({self.first[same]}) and {name!a} ({self.first[name]}) differ "
                    "only in white space or in the composition of the same Unicode characters. If they are the same "
                    f"{self.role}, correct the data; if they are different, list all {self.role}s in {self.setting}."
                )
