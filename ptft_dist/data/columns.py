"""Messages for missing columns, with a mapping to copy; and names of columns that say what they contain."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches

LABELS = (
    *("label", "labels", "gold", "class", "category", "sentiment", "intent", "topic", "relation"),
    *("score", "similarity_score", "rating", "stars", "target", "y"),
)
TEXTS = ("text", "sentence", "review", "content", "document", "body", "comment", "tweet", "title", "question", "query")
QUESTIONS = ("instruction", "prompt", "question", "query")
ANSWERS = ("output", "completion", "response", "answer")

_NAMES: dict[str, Sequence[str]] = {
    "text": TEXTS,
    "label": LABELS,
    "instruction": QUESTIONS,
    "prompt": QUESTIONS,
    "output": ANSWERS,
    "completion": ANSWERS,
    "tokens": ("words",),
    "tags": ("ner_tags", "pos_tags", "labels", "ner"),
}
"""Role -> names that columns with it often have, the most likely one first."""
PLACEHOLDER = "YOUR_COLUMN"


def missing_columns(
    missing: Mapping[str, str], has: Sequence[str], *, present: Collection[str] = (), key: str | None = None
) -> str:
    """The message for columns that a task needs and a row does not have.

    Args:
        missing: role -> the column that was looked for.
        has: the columns that there are.
        present: those of them that other roles have.
        key: that of the source, such as data.train.0, for the form of the command line.
    """
    mapping = proposed(missing, [column for column in has if column not in present])
    return (
        f"{_none_of(missing.values(), has)} Map {'one of ' * (len(missing) == 1)}them with {as_fields(mapping, key)}."
    )


def missing_text(field: str, has: Sequence[str], key: str | None = None) -> str:
    """The message for documents without their column `field`."""
    column = proposed({"text": field}, has)["text"]
    override = f" ({key}.field={column})" if key else ""
    return f"{_none_of([field], has)} Name the column with the text with field: {column}{override}."


def as_fields(mapping: Mapping[str, str], key: str | None = None) -> str:
    """A mapping role -> column as YAML and, with the key of its source, as overrides."""
    overrides = " ".join(f"{key}.fields.{role}={column}" for role, column in mapping.items())
    pairs = ", ".join(f"{role}: {column}" for role, column in mapping.items())
    return f"fields: {{{pairs}}}" + (f" ({overrides})" if key else "")


def proposed(roles: Iterable[str], free: Sequence[str]) -> dict[str, str]:
    """Role -> a column of a similar name, or the only one that is left for the only role; else a placeholder."""
    left = list(free)
    found = dict.fromkeys(roles, PLACEHOLDER)
    for role in found:
        if column := _similar(role, left):
            found[role] = column
            left.remove(column)
    open_roles = [role for role, column in found.items() if column == PLACEHOLDER]
    if len(open_roles) == len(left) == 1:
        found[open_roles[0]] = left[0]
    return found


def _similar(role: str, columns: Sequence[str]) -> str | None:
    names = {column.lower(): column for column in reversed(columns)}
    known = (name for name in (role, *_NAMES.get(role, ())) if name in names)
    near = next(known, None) or next(iter(get_close_matches(role, names, n=1, cutoff=0.75)), None)
    return None if near is None else names[near]


def _none_of(columns: Iterable[str], has: Sequence[str]) -> str:
    missing = " and no field ".join(map(repr, columns))
    return f"there is no field {missing}; the fields are: {', '.join(map(repr, has)) or 'none'}."
