"""Invalid rows of classification and regression: file, line and remedy, exit code 3; or skipped and counted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from preloaded_ranks import forked_ptft
from prepare_support import prepare
from support import start
from tiny import WORDS, write_tiny

from ptft_dist.api import load_recipe
from ptft_dist.data.prepare import describe
from ptft_dist.errors import DataError

REMEDY = "skip bad rows with data.bad_rows: skip"


@dataclass
class Case:
    """A row that is added after 30 valid ones, and the expected message."""

    row: dict[str, Any] | str
    says: list[str]
    task: str = "classification"
    section: dict[str, Any] = field(default_factory=dict)


SPANS = {"entities": True, "class_weights": None}
TEXT = "red cat runs"
SEVERAL = {"multi_label": True, "class_weights": None}

CASES: dict[str, Case] = {
    "no label": Case({"text": TEXT}, ["there is no field 'label'", "fields: {label: YOUR_COLUMN}"]),
    "a null label": Case({"text": TEXT, "label": None}, ["'label' is null", "remove the row"]),
    "an empty label": Case({"text": TEXT, "label": " "}, ["the label is an empty string"]),
    "a fraction as a label": Case({"text": TEXT, "label": 0.5}, ["a label is a text or a whole number"]),
    "a list where one label is expected": Case({"text": TEXT, "label": ["a", "b"]}, ["a list", "multi_label: true"]),
    "one label where a list is expected": Case(
        {"text": TEXT, "label": "a"}, ["is a string and not a list"], section=SEVERAL
    ),
    "a label twice": Case(
        {"text": TEXT, "label": ["a", "a"]}, ["a label is listed twice", "Remove one"], section=SEVERAL
    ),
    "a label that is an object": Case({"text": TEXT, "label": {"a": 1}}, ["the label is an object"]),
    "a label that is not listed": Case(
        {"text": TEXT, "label": "plant"},
        ["'plant' is none of animal, thing", "classification.labels"],
        section={"labels": ["animal", "thing"]},
    ),
    "no text": Case({"label": "animal"}, ["there is no field 'text'", "fields: {text: YOUR_COLUMN}"]),
    "an empty text": Case({"text": " \n", "label": "animal"}, ["'text' is empty", "remove the row"]),
    "a number as a text": Case({"text": 7, "label": "animal"}, ["'text' is a number and not text"]),
    "half a surrogate pair": Case('{"text": "\\ud83d", "label": "animal"}', ["half of a surrogate pair"]),
    "half a surrogate pair in a label": Case(
        '{"text": "red cat", "label": "\\ud83d"}', ["field 'label'", "half of a surrogate pair"]
    ),
    "half a surrogate pair in a list of labels": Case(
        '{"text": "red cat", "label": ["animal", "\\ud83d"]}', ["field 'label'", "half of a"], section=SEVERAL
    ),
    "no second text": Case(
        {"text": TEXT, "label": "animal"}, ["no field 'text_pair'"], section={"pair": True, "class_weights": None}
    ),
    "a span outside the text": Case(
        {"text": TEXT, "label": "animal", "head": [0, 3], "tail": [4, 99]},
        ["tail: [4, 99] is not a span of the text, which has 12 characters"],
        section=SPANS,
    ),
    "an empty span": Case(
        {"text": TEXT, "label": "animal", "head": [3, 3], "tail": [4, 7]}, ["head: [3, 3] is not a span"], section=SPANS
    ),
    "overlapping spans": Case(
        {"text": TEXT, "label": "animal", "head": [0, 5], "tail": [4, 7]},
        ["[0, 5] and tail [4, 7] overlap"],
        section=SPANS,
    ),
    "a span of words": Case(
        {"text": TEXT, "label": "animal", "head": "red", "tail": [4, 7]}, ["'head' is a string"], section=SPANS
    ),
    "a text with a marker": Case(
        {"text": "red [E2] cat", "label": "animal", "head": [0, 3], "tail": [9, 12]},
        ["contains the entity marker"],
        section=SPANS,
    ),
    "not a number": Case({"text": TEXT, "label": "much"}, ["'much' is not a number"], "regression"),
    "NaN": Case('{"text": "red cat", "label": NaN}', ["nan, which is not a finite number"], "regression"),
    "infinity": Case({"text": TEXT, "label": "-inf"}, ["-inf, which is not a finite number"], "regression"),
    "a number too large": Case({"text": TEXT, "label": 1e60}, ["is too large for fp32"], "regression"),
    "a boolean as a number": Case({"text": TEXT, "label": True}, ["a boolean and not a number"], "regression"),
    "a list of numbers": Case({"text": TEXT, "label": [1.0]}, ["a list and not a number"], "regression"),
    "no number": Case({"text": TEXT, "label": None}, ["'label' is null"], "regression"),
}


def good(i: int, case: Case) -> dict[str, Any]:
    words = [WORDS[(i + k) % 14] for k in range(2, 5)]
    row: dict[str, Any] = {"text": " ".join(words), "label": ["animal", "thing"][i % 2]}
    if case.task == "regression":
        row["label"] = i / 10
    if case.section.get("multi_label"):
        row["label"] = [row["label"]]
    if case.section.get("pair"):
        row["text_pair"] = "old house"
    if case.section.get("entities"):
        row |= {"head": [0, len(words[0])], "tail": [len(words[0]) + 1, len(words[0]) + 2]}
    return row


def broken(folder: Path, case: Case, **changes: Any) -> Path:
    """A recipe with rows.jsonl whose line 31 is invalid."""
    section = {"pair": False} | case.section if case.task == "regression" else case.section
    path = write_tiny(
        folder, case.task, **{case.task: section, "batch": {"global_size": 4, "micro_size": 2}, **changes}
    )
    last = case.row if isinstance(case.row, str) else json.dumps(case.row)
    (folder / "rows.jsonl").write_text("\n".join([*(json.dumps(good(i, case)) for i in range(30)), last]) + "\n")
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_broken_row_stops_or_is_counted(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    path = broken(tmp_path, case, data={"cache_dir": "cache"})
    loaded = load_recipe(str(path))
    with pytest.raises(DataError) as failure:
        prepare(loaded.recipe, loaded.base)
    message = str(failure.value)
    assert f"{tmp_path}/rows.jsonl:31: " in message
    assert REMEDY in message
    for text in case.says:
        assert text in message
    skipping = load_recipe(str(path), ["data.bad_rows=skip"])
    report = prepare(skipping.recipe, skipping.base).report
    assert report.bad_rows.count == 1
    assert report.read == 31
    assert report.validation is not None
    assert report.train.examples + report.validation.examples == 30
    assert report.bad_rows.first[0].startswith(f"{tmp_path}/rows.jsonl:31: ")
    assert "1 bad row " in describe(report)
    assert "rows.jsonl:31" in describe(report)


@pytest.mark.parametrize("name", ["no label", "overlapping spans", "NaN"])
def test_the_command_ends_with_3(tmp_path: Path, cache: Path, name: str) -> None:
    broken(tmp_path, CASES[name])
    ended = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert ended.wait() == 3
    for text in ("rows.jsonl:31", REMEDY, *CASES[name].says):
        assert text in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_command_line_itself(tmp_path: Path) -> None:
    broken(tmp_path, CASES["a null label"])
    ended = forked_ptft("prepare", "recipe.yaml", cwd=tmp_path, env={"PTFT_CACHE": str(tmp_path / "cache")})
    assert ended.returncode == 3
    assert "rows.jsonl:31: the field 'label' is null" in ended.stderr
    assert "Traceback" not in ended.stderr


def told(folder: Path, **changes: Any) -> str:
    """The error message for the data of a recipe."""
    loaded = load_recipe(str(write_tiny(folder, "classification", **changes)))
    with pytest.raises(DataError) as failure:
        prepare(loaded.recipe, loaded.base)
    return str(failure.value)


def lines(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_unknown_label_in_the_validation_rows(tmp_path: Path) -> None:
    lines(tmp_path / "held.jsonl", {"text": "a", "label": "animal"}, {"text": "b", "label": "stone"})
    message = told(tmp_path, data={"validation": [{"path": "held.jsonl"}], "cache_dir": "cache"})
    assert f"{tmp_path}/held.jsonl:2: the label 'stone' is none of animal, thing" in message
    assert "classification.labels" in message


def test_one_label_alone(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "classification", data={"cache_dir": "cache"})
    lines(tmp_path / "rows.jsonl", *({"text": f"row {i}", "label": "same"} for i in range(20)))
    loaded = load_recipe(str(path))
    with pytest.raises(DataError, match=r"the labels same; a classifier needs two or more\. Correct the label column"):
        prepare(loaded.recipe, loaded.base)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "rows.csv",
            "sentence,label\nred,a\nblue,b\n",
            "rows.csv:1: there is no field 'text'; the fields",
        ),
        ("rows.tsv", "text\tgold\nred\ta\n", "rows.tsv:1: there is no field 'label'"),
        ("rows.csv", "text,label\nred,a,b\n", "rows.csv:2: this row has 3 columns, but the header has 2"),
        ("rows.csv", "text,label\nred,\nblue,b\n", "rows.csv:2: the label is an empty string"),
    ],
)
def test_tables(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    assert says in told(tmp_path, data={"train": [{"path": name}], "cache_dir": "cache"})


def test_many_bad_rows_are_told_of_together(tmp_path: Path) -> None:
    """Mixed types: the first ten by line, and how many more."""
    lines(tmp_path / "held.jsonl", {"text": "a", "label": "a"})
    held = {"validation": [{"path": "held.jsonl"}], "cache_dir": "cache"}
    path = write_tiny(tmp_path, "classification", data=held)
    labels: list[Any] = [["x"], 1.5, "a", "b", None]
    lines(tmp_path / "rows.jsonl", *({"text": f"row {i}", "label": labels[i % 5]} for i in range(40)))
    loaded = load_recipe(str(path))
    with pytest.raises(DataError) as failure:
        prepare(loaded.recipe, loaded.base)
    message = str(failure.value).splitlines()
    numbers = [int(line.split(": ")[0].rpartition(":")[2]) for line in message[:10]]
    assert numbers == [1, 2, 5, 6, 7, 10, 11, 12, 15, 16]
    assert message[10] == "and 14 more rows"
    assert "Correct these 24 rows" in message[11]


def test_all_rows_are_bad(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "regression", data={"cache_dir": "cache", "bad_rows": "skip"})
    lines(tmp_path / "rows.jsonl", *({"text": "a", "text_pair": "b", "label": "x"} for _ in range(5)))
    loaded = load_recipe(str(path))
    with pytest.raises(DataError, match="no rows for train"):
        prepare(loaded.recipe, loaded.base)
