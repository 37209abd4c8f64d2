"""The names of the labels or tags in the data."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

from ptft_dist.errors import DataError


@dataclass
class LabelNames:
    """Collects names, and refuses names that look equal."""

    role: str
    """`label` or `tag`, for messages."""
    setting: str
    """The recipe's key that can list the names."""
    first: dict[str, str] = field(default_factory=dict)
    """Name -> its first place in the data."""

    def add(self, names: Iterable[str], where: str) -> None:
        for name in names:
            self.first.setdefault(name, where)

    def check_distinct(self) -> None:
        """
        Raises:
            DataError: two names differ only in white space, or in how Unicode composes the same characters.
        """
        seen: dict[str, str] = {}
        for name in sorted(self.first):
            same = seen.setdefault(" ".join(unicodedata.normalize("NFC", name).split()), name)
            if same != name:
                raise DataError(
                    f"data: the {self.role}s {same!a} ({self.first[same]}) and {name!a} ({self.first[name]}) differ "
                    "only in white space or in the composition of the same Unicode characters. Correct the data so "
                    f"that they are one {self.role}; if they are two, list all of them in {self.setting}."
                )
