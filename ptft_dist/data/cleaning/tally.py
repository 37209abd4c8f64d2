"""Counts of what the steps did to the records, with the first examples of each reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ptft_dist.data.report import Entry, Sample, StepReport

SHOWN = 5
"""Examples of each reason."""
_AROUND = 200  # characters of an example


@dataclass
class Tally:
    """What one step did: the records that it got, changed and dropped."""

    read: int = 0
    changed: int = 0
    notes: dict[str, Entry] = field(default_factory=dict)
    """Kinds of changes -> records."""
    dropped: dict[str, Entry] = field(default_factory=dict)
    """Reasons -> dropped records."""
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """The first examples: of changes under "changed", of dropped records under their reason."""

    def change(self, where: str, before: str, after: str, notes: tuple[str, ...]) -> None:
        """Count a changed record. before, after: the changed text."""
        self.changed += 1
        for note in notes:
            _count(self.notes, note, where)
        samples = self.samples.setdefault("changed", [])
        if len(samples) < SHOWN:
            samples.append(Sample(where, *_difference(before, after)))

    def drop(self, where: str, reason: str, text: str, instead: str | None = None) -> None:
        """Count a dropped record. instead: the text that is kept in its place, of a duplicate."""
        _count(self.dropped, reason, where)
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SHOWN:
            samples.append(Sample(where, text[:_AROUND], None if instead is None else instead[:_AROUND]))

    def add(self, other: Tally) -> None:
        """Add the counts of the records that follow."""
        self.read += other.read
        self.changed += other.changed
        for mine, more in ((self.notes, other.notes), (self.dropped, other.dropped)):
            for reason, (times, places) in more.items():
                before, shown = mine.get(reason, Entry(0, []))
                mine[reason] = Entry(before + times, [*shown, *places][:SHOWN])
        for reason, samples in other.samples.items():
            self.samples[reason] = [*self.samples.get(reason, []), *samples][:SHOWN]

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON values."""
        return {
            "read": self.read,
            "changed": self.changed,
            "notes": self.notes,
            "dropped": self.dropped,
            "samples": self.samples,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The counts from JSON values. Raises KeyError or TypeError if they are damaged."""
        return cls(
            values["read"],
            values["changed"],
            {reason: Entry(*entry) for reason, entry in values["notes"].items()},
            {reason: Entry(*entry) for reason, entry in values["dropped"].items()},
            {reason: [Sample(*sample) for sample in samples] for reason, samples in values["samples"].items()},
        )

    def report(self, name: str, fingerprint: str) -> StepReport:
        """The entry of this step in the data report."""
        return StepReport(name, fingerprint, self.notes, self.read, self.changed, self.dropped, self.samples)


def _count(entries: dict[str, Entry], reason: str, where: str) -> None:
    times, places = entries.get(reason, Entry(0, []))
    entries[reason] = Entry(times + 1, [*places, where] if len(places) < SHOWN else places)


def _difference(before: str, after: str) -> tuple[str, str]:
    """The parts of two texts around their first difference."""
    shorter = min(len(before), len(after))
    first = next((i for i in range(0, shorter, 64) if before[i : i + 64] != after[i : i + 64]), shorter)
    while first < shorter and before[first] == after[first]:
        first += 1
    start = max(0, first - _AROUND // 4)
    return before[start : start + _AROUND], after[start : start + _AROUND]
