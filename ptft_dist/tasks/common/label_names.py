"""The names of the labels or tags that occur in the data."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field

from ptft_dist.errors import DataError


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
