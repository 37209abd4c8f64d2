"""Messages about columns that are missing or fit no task: they name the roles, and a mapping that works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ptft_dist.config.recipe import Source
from ptft_dist.data.sources import read_documents, read_records
from ptft_dist.errors import DataError

ROLES = ("text", "label")


def refused(folder: Path, name: str, text: str, fields: dict[str, str] | None = None) -> str:
    (folder / name).write_text(text)
    source = Source(path=name, fields=fields or {}).named("data.train.0")
    with pytest.raises(DataError) as caught:
        list(read_records(source, folder, ROLES))
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("header", "fields", "expected"),
    [
        (
            "review,sentiment",
            {},
            "there is no field 'text' and no field 'label'; the fields are: 'review', 'sentiment'. Map them with "
            "fields: {text: review, label: sentiment} "
            "(data.train.0.fields.text=review data.train.0.fields.label=sentiment).",
        ),
        (
            "a,b",
            {},
            "there is no field 'text' and no field 'label'; the fields are: 'a', 'b'. Map them with "
            "fields: {text: YOUR_COLUMN, label: YOUR_COLUMN} "
            "(data.train.0.fields.text=YOUR_COLUMN data.train.0.fields.label=YOUR_COLUMN).",
        ),
        (
            "text,label",
            {"text": "review"},
            "there is no field 'review'; the fields are: 'text', 'label'. Map one of them with "
            "fields: {text: text} (data.train.0.fields.text=text).",
        ),
        (
            "words,label",
            {"text": "review"},
            "there is no field 'review'; the fields are: 'words', 'label'. Map one of them with "
            "fields: {text: words} (data.train.0.fields.text=words).",
        ),
        (
            "a,b,label",
            {},
            "there is no field 'text'; the fields are: 'a', 'b', 'label'. Map one of them with "
            "fields: {text: YOUR_COLUMN} (data.train.0.fields.text=YOUR_COLUMN).",
        ),
    ],
)
def test_a_table_without_columns(tmp_path: Path, header: str, fields: dict[str, str], expected: str) -> None:
    values = ",".join("x" for _ in header.split(","))
    assert refused(tmp_path, "rows.csv", f"{header}\n{values}\n", fields) == f"rows.csv:1: {expected}"


def test_json_rows_without_a_mapped_column(tmp_path: Path) -> None:
    row = json.dumps({"text": "a", "label": "b"})
    assert refused(tmp_path, "rows.jsonl", row, {"text": "review"}) == (
        "fields: {text: review}: no row of this source has a column 'review'; the fields are: 'text', 'label'. "
        "Correct it: fields: {text: text} (data.train.0.fields.text=text)."
    )


@pytest.mark.parametrize(("columns", "guess"), [(("body", "n"), "body"), (("a", "b"), "YOUR_COLUMN"), (("a",), "a")])
def test_documents_without_their_column(tmp_path: Path, columns: tuple[str, ...], guess: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(dict.fromkeys(columns, "x")))
    with pytest.raises(DataError, match=rf"with the text with field: {guess} \(data\.train\.0\.field={guess}\)\.$"):
        list(read_documents(Source(path="rows.jsonl").named("data.train.0"), tmp_path))
