"""Pieces of Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table. Line ends and bars in cells are replaced."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines) + "\n"


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def sentence(text: str) -> str:
    """Text with a full stop, as one line."""
    line = " ".join(text.split())
    return line if not line or line[-1] in ".?!" else line + "."


def anchor(heading: str) -> str:
    """The anchor of a heading that is a dotted key, as GitHub and MkDocs make it."""
    return "".join(c for c in heading.lower().replace(" ", "-") if c.isalnum() or c in "-_")
