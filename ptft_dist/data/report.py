"""The report of `prepare`: what was read, dropped and written. Typed, as JSON for files, and as lines of text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any, NamedTuple, Self

from ptft_dist.reporting.messages import counted

_SHOWN_PLACES = 5
_SHOWN_BAD_ROWS = 10
_SHOWN_LABELS = 20
_SHOWN_REASONS = 4
_MANY = 0.1  # a larger share of dropped records is shown as a warning


class Entry(NamedTuple):
    """How often something happened, and the first places ("file:line")."""

    times: int
    places: list[str]


class Notes:
    """Counts records by reason, in the order of first occurrence."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def add(self, reason: str, where: str) -> None:
        count, places = self.entries.get(reason, Entry(0, []))
        if len(places) < _SHOWN_PLACES:
            places.append(where)
        self.entries[reason] = Entry(count + 1, places)

    def merge(self, entries: Mapping[str, Entry]) -> None:
        for reason, (count, places) in entries.items():
            before, shown = self.entries.get(reason, Entry(0, []))
            self.entries[reason] = Entry(before + count, [*shown, *places][:_SHOWN_PLACES])


@dataclass
class BadRows:
    """Invalid rows: their number, and the first ones as "file:line: reason"."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, reason: object) -> None:
        self.count += 1
        if len(self.first) < _SHOWN_BAD_ROWS:
            self.first.append(f"{where}: {reason}")

    def merge(self, other: BadRows) -> None:
        self.count += other.count
        self.first = [*self.first, *other.first][:_SHOWN_BAD_ROWS]


class RowTally(BadRows):
    """Bad rows, and the files in which every row is bad for the same reason."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[str, str | None] = {}
        """File -> the one reason of all its rows so far; None: there are several, or good rows."""
        self._counts: dict[str, int] = {}

    def add(self, where: str, reason: object) -> None:
        super().add(where, reason)
        file, text = file_of(where), str(reason)
        self._counts[file] = self._counts.get(file, 0) + 1
        if self._files.setdefault(file, text) != text:
            self._files[file] = None

    def good(self, where: str) -> None:
        """Count a valid row."""
        self._files[file_of(where)] = None

    def message(self, *, skippable: bool) -> str:
        """The error: files without a good row once, other rows one by one, and the remedy for those."""
        whole = {file: reason for file, reason in self._files.items() if reason is not None and self._counts[file] > 1}
        lines = [f"{file}: every row: {reason}" for file, reason in list(whole.items())[:_SHOWN_BAD_ROWS]]
        rows = [line for line in self.first if not any(line.startswith((f"{file}:", f"{file}#")) for file in whole)]
        left = self.count - sum(self._counts[file] for file in whole)
        if len(whole) > len(lines):
            lines.append(f"and {len(whole) - len(lines):,} more files")
        if left:
            lines += rows + [f"and {left - len(rows):,} more rows"] * (left > len(rows))
            these = "this row" if left == 1 else f"these {left:,} rows"
            skip = f"Correct {these}, or skip bad rows with data.bad_rows: skip."
            lines.append(skip if skippable else "Correct or remove these rows.")
        return "\n".join(lines)


def file_of(where: str) -> str:
    """The file of a place such as rows.jsonl:3."""
    return re.sub(r"[:#]\d+$", "", where)


@dataclass(frozen=True)
class SideReport:
    """The store of one side (train or validation)."""

    examples: int
    """Number of documents in a token store; otherwise number of examples. Packing puts several into a row."""
    rows: int
    tokens: int
    text_bytes: int
    """Size of the texts in UTF-8."""
    dropped_tokens: int = 0
    """Number of dropped one-token rows, which have nothing to predict."""


def sum_of_sides(reports: Sequence[SideReport]) -> SideReport:
    """The report of several stores of one side together."""
    return SideReport(*(sum(numbers) for numbers in zip(*map(astuple, reports), strict=True)))


class SourceReport(NamedTuple):
    """What one source gave, before packing."""

    records: int
    examples: int
    tokens: int
    text_bytes: int

    def plus(self, other: SourceReport) -> SourceReport:
        """This report and another one together."""
        return SourceReport(*(one + more for one, more in zip(self, other, strict=True)))


class Sample(NamedTuple):
    """An excerpt of a record that a step changed or dropped."""

    where: str
    before: str
    after: str | None = None
    """The same part after the change; of a dropped duplicate, the text that is kept; None: dropped for another
    reason."""


@dataclass(frozen=True)
class StepReport:
    """The counts of a step between the sources and the encoder."""

    name: str
    fingerprint: str
    notes: dict[str, Entry]
    """Changed records, by kind of change."""
    read: int = 0
    """Records that it got. 0: not counted."""
    changed: int = 0
    """Records that it changed."""
    dropped: dict[str, Entry] = field(default_factory=dict)
    """Records that it dropped, by reason."""
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """Examples: of changed records under "changed", of dropped ones under their reason."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The entry from JSON values, also from those of earlier versions."""
        return cls(
            values["name"],
            values["fingerprint"],
            _entries(values["notes"]),
            values.get("read", 0),
            values.get("changed", 0),
            _entries(values.get("dropped", {})),
            {reason: [Sample(*s) for s in samples] for reason, samples in values.get("samples", {}).items()},
        )


@dataclass(frozen=True)
class Report:
    """What was read, dropped and written when the stores were written."""

    reads: str
    """What a record is called: `document` or `row`."""
    read: int
    """Number of records in the sources, of both sides together."""
    train: SideReport
    validation: SideReport | None
    steps: list[StepReport]
    bad_rows: BadRows
    dropped: dict[str, Entry]
    """Valid records that are in no store, by reason."""
    notes: dict[str, Entry]
    """Other changes of records, such as truncation, by reason."""
    survey: dict[str, Any]
    """Properties of the training records, such as the labels."""
    max_length: int
    packing: bool
    vocabulary: int
    """Number of tokens of the tokenizer."""
    unknown_tokens: int
    """Number of unknown tokens (UNK) in the stores."""
    unit: str = ""
    """What the stores hold: `document` or `example`; empty in the report of an earlier version."""
    sources: dict[str, SourceReport] = field(default_factory=dict)
    """Source, such as train[0] -> what it gave. A split by fraction or folds makes validation[0] of a part of it."""
    warnings: list[str] = field(default_factory=list)
    """Other warnings, such as special tokens around documents that the tokenizer itself does not add."""
    tokenizer: str = ""
    """The directory of the tokenizer, when the stores were written."""
    seconds: float = 0.0
    versions: dict[str, Any] = field(default_factory=dict)

    @property
    def sides(self) -> dict[str, SideReport]:
        """The stores by their names."""
        return {"train": self.train} | ({"validation": self.validation} if self.validation else {})

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The report from JSON values, also from those of earlier versions.

        Raises:
            KeyError, TypeError: the values are not a report.
        """
        given = dict(values if "reads" in values else _of_earlier_version(values))
        validation = given["validation"]
        return cls(
            **given
            | {
                "train": SideReport(**given["train"]),
                "validation": None if validation is None else SideReport(**validation),
                "steps": [StepReport.from_dict(step) for step in given["steps"]],
                "bad_rows": BadRows(**given["bad_rows"]),
                "dropped": _entries(given["dropped"]),
                "notes": _entries(given["notes"]),
                "sources": {key: SourceReport(*each) for key, each in given.get("sources", {}).items()},
            }
        )


def _entries(values: Mapping[str, Sequence[Any]]) -> dict[str, Entry]:
    return {reason: Entry(count, list(places)) for reason, (count, places) in values.items()}


def _of_earlier_version(old: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an old report.json without `reads`, which had different keys for documents and rows."""
    documents = "documents_read" in old

    def side(values: Mapping[str, Any]) -> dict[str, Any]:
        counts = {key: values[key] for key in ("rows", "tokens", "text_bytes")}
        examples = values["documents"] if "documents" in values else values["examples"]
        return counts | {"examples": examples, "dropped_tokens": values.get("dropped_tokens", 0)}

    notes = old.get("notes", {})
    dropped = {reason: entry for reason, entry in notes.items() if reason.startswith("left out")}
    if old.get("documents_empty"):
        dropped["without text"] = (old["documents_empty"], old["empty_at"])
    same = ("max_length", "packing", "vocabulary", "unknown_tokens", "seconds", "versions")
    return {key: old[key] for key in same} | {
        "reads": "document" if documents else "row",
        "read": old["documents_read"] if documents else old["rows_read"],
        "train": side(old["train"]),
        "validation": side(old["validation"]) if old["validation"] else None,
        "steps": [],
        "bad_rows": {"count": old.get("bad_rows", 0), "first": old.get("bad_rows_at", [])},
        "dropped": dropped,
        "notes": {reason: entry for reason, entry in notes.items() if reason not in dropped},
        "survey": old.get("facts", {}),
    }


def describe(report: Report, *, from_cache: bool = False) -> str:
    """The report as a few lines of text."""
    sides = report.sides
    unit = report.unit or ("document" if report.reads == "document" else "example")
    lines = [
        (name, f"{counted(side.examples, unit)}, {_size(side.text_bytes)} of text, {side.tokens:,} tokens")
        for name, side in sides.items()
    ]
    layout = "packed" if report.packing else f"each of one {unit}"
    counts = " + ".join(f"{side.rows:,}" for side in sides.values())
    lines.append(("rows", f"{counts} of up to {report.max_length:,} tokens, {layout}"))
    lines.append(("vocabulary", f"{report.vocabulary:,} tokens"))
    if labels := report.survey.get("labels"):
        more = f" and {len(labels) - _SHOWN_LABELS} more" if len(labels) > _SHOWN_LABELS else ""
        lines.append(("labels", ", ".join(labels[:_SHOWN_LABELS]) + more))
    lines += _steps(report)
    lines += _losses(report, sum(side.dropped_tokens for side in sides.values()))
    notes = [entry for step in report.steps if not step.read for entry in step.notes.items()]
    notes += list(report.notes.items())
    noted = unit if report.reads == "document" else report.reads
    lines += [("note", f"{counted(count, noted)} {reason}: {_places(count, at)}") for reason, (count, at) in notes]
    lines += [("warning", text) for text in report.warnings]
    if report.unknown_tokens:
        lines.append(("warning", f"{report.unknown_tokens:,} unknown tokens: the tokenizer cannot encode this text"))
    lines.append(("prepared in", f"{report.seconds:,.1f} s" + ", loaded from the cache" * from_cache))
    return "\n".join(f"{name + ':' if name else '':<13}{text}" for name, text in lines)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB"


def _steps(report: Report) -> list[tuple[str, str]]:
    """A line for each step of data.steps: how many records it got, changed and dropped."""
    lines: list[tuple[str, str]] = []
    for step in report.steps:
        if not step.read:
            continue
        did = [f"changed {step.changed:,}"] * bool(step.changed)
        if step.dropped:
            reasons = sorted(step.dropped.items(), key=lambda entry: -entry[1].times)
            text = "; ".join(f"{each.times:,} x {reason}" for reason, each in reasons[:_SHOWN_REASONS])
            more = "; ..." * (len(reasons) > _SHOWN_REASONS)
            did.append(f"dropped {sum(each.times for each in step.dropped.values()):,} ({text}{more})")
        lines.append(("" if lines else "steps", f"{step.name} of {step.read:,}: {', '.join(did) or 'no change'}"))
    return lines


def _losses(report: Report, one_token_rows: int) -> list[tuple[str, str]]:
    """The lines about records that are in no row."""
    lines = []
    for reason, (count, places) in report.dropped.items():
        many = count > _MANY * report.read
        of = f"{count:,} of {counted(report.read, report.reads)}" if many else counted(count, report.reads)
        text = f"{of} {reason}: {_places(count, places)}"
        lines.append(("warning" if many else "dropped", f"dropped {text}" if many else text))
    if one_token_rows:
        lines.append(("dropped", f"{counted(one_token_rows, 'one-token row')}: nothing to predict"))
    bad = report.bad_rows
    if bad.count:
        lines.append(("dropped", f"{counted(bad.count, 'bad row')} (data.bad_rows: skip):"))
        lines += [("", place) for place in bad.first]
        if bad.count > len(bad.first):
            lines.append(("", f"and {bad.count - len(bad.first):,} more"))
    return lines


def _places(count: int, places: Sequence[str]) -> str:
    return ", ".join(places) + ", ..." * (count > len(places))
