"""Names of labels that the data have as numbers: from the recipe, and from ClassLabel features."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from prepare_support import prepare
from tiny import write_rows, write_tiny

from ptft_dist.data.class_labels import ClassId, with_names
from ptft_dist.data.cleaning.record_file import RecordWriter, read_records
from ptft_dist.data.formats import Record
from ptft_dist.data.prepare import Prepared
from ptft_dist.errors import DataError
from ptft_dist.tasks.registry import recipe_class

NAMES = ["world", "business", "art"]  # not alphabetical
TAGS = ["O", "B-PER", "I-PER"]
CLASSES = {"label": dict(enumerate(NAMES)), "tags": dict(enumerate(TAGS))}


def prepared(folder: Path, task: str, file: str, steps: Sequence[str] = (), **section: Any) -> Prepared:
    raw = json.loads(
        write_tiny(folder, task, **{task: {"class_weights": None} if task == "classification" else {}}).read_text()
    )
    raw[task] = section
    raw["data"] |= {"cache_dir": "cache", "validation": None, "train": [{"path": file}], "steps": list(steps)}
    raw.pop("eval")
    return prepare(recipe_class().model_validate(raw), folder)


def labels_of(prepared: Prepared) -> list[list[int]]:
    return [[int(i) for i in prepared.train.row(i).columns["labels"]] for i in range(len(prepared.train))]


def classes(count: int = 30) -> list[dict[str, Any]]:
    return [{"text": f"red cat {i}", "label": i % 3} for i in range(count)]


def test_numbers_get_the_names_of_the_recipe(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", classes())
    found = prepared(tmp_path, "classification", "mine.jsonl", label_names=dict(enumerate(NAMES)))
    assert found.survey["labels"] == NAMES
    assert sorted(found.survey["frequencies"]) == [10, 10, 10]
    assert labels_of(found) == [[i % 3] for i in range(30)]


def test_the_names_may_merge_classes_and_numbers_may_be_texts(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("text,label\n" + "".join(f"red cat {i},{i % 3}\n" for i in range(30)))
    found = prepared(tmp_path, "classification", "mine.csv", label_names={0: "other", 1: "business", 2: "other"})
    assert found.survey["labels"] == ["other", "business"]
    assert labels_of(found) == [[[0, 1, 0][i % 3]] for i in range(30)]


def test_whole_numbers_may_be_floats(tmp_path: Path) -> None:
    """pandas makes floats of a column of integers with a null."""
    rows = [{**row, "label": float(row["label"])} for row in classes()]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "mine.parquet"))
    found = prepared(tmp_path, "classification", "mine.parquet", label_names=dict(enumerate(NAMES)))
    assert found.survey["labels"] == NAMES
    assert labels_of(found) == [[i % 3] for i in range(30)]


def test_a_number_without_a_name_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", classes())
    with pytest.raises(DataError, match=r"the label '2' is none of world, business.*classification.label_names"):
        prepared(tmp_path, "classification", "mine.jsonl", label_names={0: "world", 1: "business"})


@pytest.mark.parametrize("steps", [[], ["whitespace", "exact_dedup"]])
@pytest.mark.parametrize("key", ["label_names", "none"])
def test_class_labels_of_a_parquet_file(tmp_path: Path, key: str, steps: list[str]) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_list(classes(), features=features).to_parquet(str(tmp_path / "mine.parquet"))
    section = {"label_names": {0: "a", 1: "b", 2: "c"}} if key == "label_names" else {}
    found = prepared(tmp_path, "classification", "mine.parquet", steps, **section)
    assert found.survey["labels"] == (["a", "b", "c"] if section else NAMES)
    assert labels_of(found) == [[i % 3] for i in range(30)]


def test_regression_still_gets_numbers(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_list(classes(), features=features).to_parquet(str(tmp_path / "mine.parquet"))
    found = prepared(tmp_path, "regression", "mine.parquet")
    assert [float(found.train.row(i).columns["labels"][0]) for i in range(3)] == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("steps", [[], ["exact_dedup"]])
@pytest.mark.parametrize("how", ["recipe", "features"])
def test_tag_ids(tmp_path: Path, how: str, steps: list[str]) -> None:
    rows = [{"tokens": ["red", "cat", f"sat{i}"], "tags": [0, 1, 2]} for i in range(20)]
    section: dict[str, Any] = {"scheme": "iob2", "steps": steps}
    if how == "recipe":
        write_rows(tmp_path / "mine.jsonl", rows)
        found = prepared(tmp_path, "token_classification", "mine.jsonl", label_names=dict(enumerate(TAGS)), **section)
    else:
        tags = datasets.List(datasets.ClassLabel(names=TAGS))
        features = datasets.Features({"tokens": datasets.List(datasets.Value("string")), "tags": tags})
        datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "mine.parquet"))
        found = prepared(tmp_path, "token_classification", "mine.parquet", **section)
    assert found.survey["labels"] == TAGS
    assert [label for label in labels_of(found)[0] if label >= 0] == [0, 1, 2]


def test_tag_ids_without_names_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "mine.jsonl", [{"tokens": ["red"], "tags": [0]}] * 20)
    with pytest.raises(DataError, match=r"is a number; .*set token_classification.label_names: \{0: O, 1: B-PER"):
        prepared(tmp_path, "token_classification", "mine.jsonl")


def test_a_class_id_is_a_number_with_a_name() -> None:
    row = with_names({"label": 1, "tags": [0, -1, True], "text": "a"}, CLASSES)
    copied = pickle.loads(pickle.dumps(row))  # rows go to worker processes
    for each in (row, copied):
        assert each == {"label": 1, "tags": [0, -1, True], "text": "a"}
        assert (each["label"].name, each["tags"][0].name) == ("business", "O")
        assert not isinstance(each["tags"][1], ClassId)
        assert json.dumps(each) == '{"label": 1, "tags": [0, -1, true], "text": "a"}'


def test_cleaned_records_keep_the_names(tmp_path: Path) -> None:
    rows = [
        with_names({"label": 1, "tags": [0, -1, True, 2], "text": "a"}, CLASSES),
        {"label": 1, "tags": [], "text": "names"},
    ]
    writer = RecordWriter(tmp_path / "records")
    for number, row in enumerate(rows):
        writer.add(Record(row, f"file#{number}"))
    writer.close()
    found = [record.values for record in read_records(tmp_path / "records")]
    assert found == rows
    assert found[0]["label"].name == "business"
    assert [getattr(tag, "name", tag) for tag in found[0]["tags"]] == ["O", -1, True, "I-PER"]
    assert not isinstance(found[1]["label"], ClassId)
