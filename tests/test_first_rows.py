"""`ptft config check` looks at the first row of each file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

from ptft_dist.data.first_rows import check_first_rows
from ptft_dist.errors import DataError
from ptft_dist.tasks.registry import encoder_class, recipe_class

GOOD = {"text": "a", "label": "x"}
BAD = {"review": "a", "sentiment": "x"}
MAPPED = {"text": "review", "label": "sentiment"}


def check(folder: Path, *files: dict[str, Any], task: str = "classification", **data: Any) -> None:
    """Check a recipe with these sources."""
    recipe = recipe_class().model_validate(
        {
            "task": task,
            "model": {"path": "none"},
            "tokenizer": {"path": "none"},
            "data": {"train": list(files), **data},
            "batch": {"global_size": 8, "micro_size": 8},
            "train": {"max_steps": 3},
            "run_dir": "run",
        }
    )
    check_first_rows(recipe, folder, encoder_class(task))


def rows(folder: Path, name: str, *values: dict[str, Any]) -> dict[str, Any]:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in values))
    return {"path": name}


def refused(folder: Path, *files: dict[str, Any], **data: Any) -> str:
    with pytest.raises(DataError) as error:
        check(folder, *files, **data)
    return str(error.value).replace(f"{folder}/", "")


def test_good_columns(tmp_path: Path) -> None:
    check(tmp_path, rows(tmp_path, "a.jsonl", GOOD), rows(tmp_path, "b.jsonl", BAD) | {"fields": MAPPED})


def test_one_line_for_each_source(tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text("review,sentiment\na,x\n")
    files = rows(tmp_path, "a.jsonl", BAD, BAD), {"path": "b.csv"}
    first, second = refused(tmp_path, rows(tmp_path, "good.jsonl", GOOD), files[0], validation=[files[1]]).splitlines()
    fields = "Map them with fields: {text: review, label: sentiment}"
    assert first.startswith("a.jsonl:1: there is no field 'text' and no field 'label'")
    assert fields in first
    assert second.startswith("b.csv:1: there is no field 'text' and no field 'label'")
    assert f"{fields} (data.validation.0.fields.text=review" in second


def test_every_file_of_a_glob_is_looked_at(tmp_path: Path) -> None:
    rows(tmp_path, "a.jsonl", GOOD)
    rows(tmp_path, "b.jsonl", BAD)
    assert refused(tmp_path, {"path": "*.jsonl"}).startswith("b.jsonl:1: there is no field 'text'")


def test_a_mapped_column_that_is_not_there(tmp_path: Path) -> None:
    file = rows(tmp_path, "a.jsonl", GOOD) | {"fields": {"text": "review"}}
    assert "no row of this source has a column 'review'; the fields are: 'text', 'label'" in refused(tmp_path, file)
    check(tmp_path, rows(tmp_path, "b.jsonl", {"text": "a"}) | {"fields": {"system": "hint"}}, task="sft")  # not needed


def test_rows_that_may_be_bad_do_not_stop_it(tmp_path: Path) -> None:
    check(tmp_path, rows(tmp_path, "a.jsonl", BAD, GOOD), bad_rows="skip")
    bad = rows(tmp_path, "b.jsonl", BAD, BAD)
    assert refused(tmp_path, bad, bad_rows="skip").startswith("b.jsonl:1: there is no field")


def test_documents(tmp_path: Path) -> None:
    file = rows(tmp_path, "a.jsonl", {"body": "x"})
    with pytest.raises(
        DataError, match=r"Name the column with the text with field: body \(data\.train\.0\.field=body\)"
    ):
        check(tmp_path, file, task="clm")
    check(tmp_path, file | {"field": "body"}, task="clm")


def test_the_verb_imports_no_torch(tmp_path: Path) -> None:
    rows(tmp_path, "a.jsonl", {"question": "a", "answer": "b"})
    (tmp_path / "recipe.yaml").write_text(
        "task: sft\nmodel: {path: none}\ntokenizer: {path: none}\ndata: {train: [{path: a.jsonl}]}\n"
        "batch: {global_size: 8, micro_size: 8}\ntrain: {max_steps: 3}\nrun_dir: run\n"
    )
    code = (
        "import sys\nfrom ptft_dist.cli.config import check\n"
        "try: check('recipe.yaml')\nexcept Exception as error: print(error)\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    message, imported = done.stdout.splitlines()
    assert message.endswith("Map them with fields: {instruction: question, output: answer}.")
    assert imported == "[]"
