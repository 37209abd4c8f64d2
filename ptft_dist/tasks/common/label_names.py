"""The names of the labels or tags that occur in the data."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

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

    def add(self, names: Iterable[str], where: str) -> None:
        for name in names:
            self.first.setdefault(name, where)

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
