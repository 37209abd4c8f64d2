"""The interface of steps that look at one text at a time."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol


class Cleaned(NamedTuple):
    """The result of a step for one text."""

    text: str
    dropped: str | None = None
    """Why the record is dropped, such as "gopher: too few words"; the rule first."""
    notes: tuple[str, ...] = ()
    """What was changed besides what the name of the step says, such as "masked EMAIL"."""


class TextStep(Protocol):
    """A step that changes or drops texts, one by one. It is used in forked processes, and must not change itself."""

    libraries: ClassVar[tuple[str, ...]]
    """Libraries whose versions affect the results, by their names on PyPI."""
    edits: ClassVar[bool]
    """Whether it may change texts. Otherwise it only drops records, and gets all texts of a record joined by newlines.
    A step that edits gets each text of a record alone."""

    def __call__(self, text: str) -> Cleaned:
        """Clean one text, which is not empty."""
