"""Labels that look equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prepare_support import prepare
from tiny import write_rows, write_tiny

from ptft_dist.data.prepare import Prepared
from ptft_dist.errors import DataError
from ptft_dist.tasks.registry import recipe_class

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


def prepared(folder: Path, task: str, names: list[str], **section: Any) -> Prepared:
    raw = json.loads(
        write_tiny(folder, task, **{task: {"class_weights": None} if task == "classification" else {}}).read_text()
    )
    raw[task] = section
    raw["data"] |= {"cache_dir": "cache", "validation": None}
    raw.pop("eval")
    if task == "classification":
        rows = [{"text": f"red cat {i}", "label": names[i % len(names)]} for i in range(30)]
    else:
        rows = [{"tokens": ["red", "cat"], "tags": [names[i % len(names)], "O"]} for i in range(30)]
    write_rows(folder / "rows.jsonl", rows)
    return prepare(recipe_class().model_validate(raw), folder)


@pytest.mark.parametrize(
    "names", [["a", "b", " a"], ["a", "b", "a\u00a0"], ["x  y", "b", "x y"], [COMPOSED, "b", DECOMPOSED]]
)
@pytest.mark.parametrize("task", ["classification", "token_classification"])
def test_labels_that_look_alike_are_refused(tmp_path: Path, task: str, names: list[str]) -> None:
    section = {"scheme": "plain"} if task == "token_classification" else {}
    with pytest.raises(DataError) as refused:
        prepared(tmp_path, task, names, **section)
    message = str(refused.value)
    for name, line in ((names[0], 1), (names[2], 3)):
        assert f"{name!a} ({tmp_path}/rows.jsonl:{line})" in message
    assert f"{task}.labels" in message


def test_listed_labels_are_taken_as_they_are(tmp_path: Path) -> None:
    names = ["a", "b", " a"]
    assert prepared(tmp_path, "classification", names, labels=names).survey["labels"] == names


def test_other_labels_stay(tmp_path: Path) -> None:
    names = ["a", "A", "\uff21", "a b", "ab", " only with space"]  # \uff21: a full-width A
    assert prepared(tmp_path, "classification", names).survey["labels"] == sorted(names)
