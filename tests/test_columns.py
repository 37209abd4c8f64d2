"""Messages about columns that are missing or fit no task: they name the roles, and a mapping that works."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptft_dist.config.recipe import Source
from ptft_dist.data.encoder import RowError
from ptft_dist.data.report import RowTally
from ptft_dist.data.sources import read_documents, read_records
from ptft_dist.errors import DataError
from ptft_dist.tasks.sft.chat import check_shape, shape_of

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


MAPPING = r"Map them.*with fields: \{instruction: %s, output: %s\}\.$"


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (("question", "answer"), r"\(the nearest is alpaca: .*\)\. " + MAPPING % ("question", "answer")),
        (("a", "b"), MAPPING % ("YOUR_COLUMN", "YOUR_COLUMN")),
        (
            ("question", "context", "answer"),
            r"fields: \{instruction: question, output: answer, input: context\}\.$",
        ),
        (("prompt", "n"), r"\(prompt_completion also needs completion\)\. Map it with fields: \{completion: n\}\.$"),
        (("output", "ask", "n"), r"\(alpaca also needs instruction\)\. Map it with fields: \{instruction: YOUR_COLUMN"),
    ],
)
def test_columns_that_fit_no_shape(columns: tuple[str, ...], says: str) -> None:
    with pytest.raises(RowError, match=says):
        shape_of(dict.fromkeys(columns, "x"))


@pytest.mark.parametrize(("key", "role"), [("role", "messages"), ("from", "conversations")])
def test_a_conversation_in_a_column_of_another_name(key: str, role: str) -> None:
    with pytest.raises(RowError, match=rf"Map it with fields: \{{{role}: chat\}}\.$"):
        shape_of({"id": 3, "chat": [{key: "user"}]})


def test_a_file_whose_rows_are_all_bad_is_one_message() -> None:
    bad = RowTally()
    for line in range(1, 31):
        bad.add(f"a.jsonl:{line}", "no column.")
    assert bad.message(skippable=True) == "a.jsonl: every row: no column."
    for line in range(1, 4):
        bad.add(f"b.jsonl:{line}", "empty.")
    bad.good("b.jsonl:4")
    assert bad.message(skippable=True) == (
        "a.jsonl: every row: no column.\n"
        "and 3 more rows\n"
        "Correct these 3 rows, or skip bad rows with data.bad_rows: skip."
    )


def test_rows_that_are_bad_for_several_reasons_are_listed() -> None:
    bad = RowTally()
    bad.add("a.jsonl:1", "empty.")
    bad.add("a.jsonl:2", "null.")
    assert bad.message(skippable=True) == (
        "a.jsonl:1: empty.\na.jsonl:2: null.\nCorrect these 2 rows, or skip bad rows with data.bad_rows: skip."
    )


@pytest.mark.parametrize(
    ("row", "shape", "says"),
    [
        (
            {"question": "a", "answer": "b"},
            "messages",
            r"do not fit sft\.shape: messages \(messages\)\. Map them with "
            r"fields: \{instruction: question, output: answer\}, and set sft\.shape: alpaca\.$",
        ),
        ({"prompt": "a", "completion": "b"}, "messages", r"\. Set sft\.shape: prompt_completion\.$"),
        ({"text": "a"}, "single_turn", r"sft\.shape: single_turn \(prompt, completion\)\. Set sft\.shape: text\.$"),
        ({"chat": [{"role": "user"}]}, "messages", r"\. Map it with fields: \{messages: chat\}\.$"),
    ],
)
def test_columns_that_do_not_fit_the_shape_of_the_recipe(row: dict[str, Any], shape: str, says: str) -> None:
    with pytest.raises(RowError, match=says):
        check_shape(row, shape)
