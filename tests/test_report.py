"""The data report: typed, the same from the cache, readable from earlier versions, and shown once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from prepare_support import prepare, recipe, save_tokenizer, write_text
from support import start
from tiny import write_tiny

from ptft_dist.api import load_recipe
from ptft_dist.data.prepare import describe
from ptft_dist.data.report import BadRows, Entry, Notes, Report, SideReport, StepReport, _size
from ptft_dist.errors import DataError
from ptft_dist.launch.environment import place
from ptft_dist.session import Session


def made(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "reads": "row",
        "read": 1000,
        "train": SideReport(examples=900, rows=400, tokens=7000, text_bytes=1_500_000),
        "validation": SideReport(examples=90, rows=50, tokens=700, text_bytes=200_000, dropped_tokens=3),
        "steps": [StepReport("augment", "0123", {"augmented (swap)": Entry(5, ["a:1", "a:2"])})],
        "bad_rows": BadRows(2, ["a:3: no label"]),
        "dropped": {"without words": Entry(8, ["a:4"])},
        "notes": {"truncated to data.max_length": Entry(1, ["a:5"])},
        "survey": {"labels": [f"l{i}" for i in range(22)], "rows": 900},
        "max_length": 32,
        "packing": True,
        "vocabulary": 320,
        "unknown_tokens": 0,
        "seconds": 1.25,
        "versions": {"prepare": 3},
    }
    return Report(**values | changes)


@pytest.mark.parametrize("changes", [{}, {"validation": None, "steps": []}])
def test_the_report_survives_json(changes: dict[str, Any]) -> None:
    report = made(**changes)
    assert Report.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_small_data_have_a_size() -> None:
    sizes = (99_960, 100_000, 0)
    assert [_size(count) for count in sizes] == ["100.0 kB", "0.1 MB", "0.0 kB"]


def test_every_line_for_people() -> None:
    assert describe(made(), from_cache=True).splitlines() == [
        "train:       900 examples, 1.5 MB of text, 7,000 tokens",
        "validation:  90 examples, 0.2 MB of text, 700 tokens",
        "rows:        400 + 50 of up to 32 tokens, packed",
        "vocabulary:  320 tokens",
        "labels:      " + ", ".join(f"l{i}" for i in range(20)) + " and 2 more",
        "dropped:     8 rows without words: a:4, ...",
        "dropped:     3 one-token rows: nothing to predict",
        "dropped:     2 bad rows (data.bad_rows: skip):",
        "             a:3: no label",
        "             and 1 more",
        "note:        5 rows augmented (swap): a:1, a:2, ...",
        "note:        1 row truncated to data.max_length: a:5",
        "prepared in: 1.2 s, loaded from the cache",
    ]


def test_many_dropped_rows_are_a_warning() -> None:
    few, many = (describe(made(dropped={"without words": Entry(n, ["a:4"])})) for n in (100, 101))
    assert "dropped:     100 rows without words" in few
    assert "warning:     dropped 101 of 1,000 rows without words" in many


def test_notes_count_all_and_keep_the_first_places() -> None:
    one, two = Notes(), Notes()
    for i in range(7):
        one.add("long", f"a:{i}")
    two.add("long", "b:1")
    two.add("short", "b:2")
    two.merge(one.entries)
    assert two.entries == {"long": (8, ["b:1", "a:0", "a:1", "a:2", "a:3"]), "short": (1, ["b:2"])}


OF_ROWS = {
    "train": {"examples": 144, "tokens": 2000, "rows": 144, "text_bytes": 10},
    "validation": {"examples": 14, "tokens": 200, "rows": 14, "text_bytes": 2},
    "rows_read": 161,
    "bad_rows": 1,
    "bad_rows_at": ["a:7: no label"],
    "notes": {"cut to data.max_length": [2, ["a:1", "a:2"]], "left out, for they have no words": [1, ["a:9"]]},
    "facts": {"labels": ["x", "y"]},
    "max_length": 32,
    "packing": False,
    "vocabulary": 320,
    "unknown_tokens": 0,
    "seconds": 0.5,
    "versions": {"prepare": 3},
}
OF_DOCUMENTS = {
    "train": {"documents": 50, "tokens": 999, "rows": 20, "dropped_tokens": 4, "text_bytes": 10},
    "validation": None,
    "documents_read": 60,
    "documents_empty": 10,
    "empty_at": ["a:1"],
} | {key: OF_ROWS[key] for key in ("max_length", "packing", "vocabulary", "unknown_tokens", "seconds", "versions")}


def test_reports_of_an_earlier_version_are_read() -> None:
    rows = Report.from_dict(OF_ROWS)
    assert (rows.reads, rows.read, rows.survey) == ("row", 161, {"labels": ["x", "y"]})
    assert rows.train == SideReport(examples=144, rows=144, tokens=2000, text_bytes=10)
    assert rows.dropped == {"left out, for they have no words": (1, ["a:9"])}
    assert rows.notes == {"cut to data.max_length": (2, ["a:1", "a:2"])}
    assert rows.bad_rows == BadRows(1, ["a:7: no label"])
    documents = Report.from_dict(OF_DOCUMENTS)
    assert (documents.reads, documents.read, documents.validation) == ("document", 60, None)
    assert documents.train == SideReport(examples=50, rows=20, tokens=999, text_bytes=10, dropped_tokens=4)
    assert documents.dropped == {"without text": (10, ["a:1"])}


def test_a_store_of_an_earlier_version_is_used(tmp_path: Path) -> None:
    base = write_text(tmp_path)
    wanted = recipe(save_tokenizer(base / "tokenizer"))
    directory = prepare(wanted, base).train.path.parent
    (directory / "report.json").write_text(json.dumps(OF_DOCUMENTS))
    found = prepare(wanted, base)
    assert found.from_cache
    assert found.report == Report.from_dict(OF_DOCUMENTS)
    (directory / "report.json").write_text('{"reads": "row"}')
    with pytest.raises(DataError, match="damaged"):
        prepare(wanted, base)


def test_the_command_says_it_once(tmp_path: Path, cache: Path) -> None:
    write_tiny(tmp_path, "classification")
    arguments = ("prepare", "recipe.yaml", "data.cache_dir=cache")
    runs = []
    for _ in range(2):
        runs.append(start(*arguments, cwd=tmp_path, cache=cache))
        assert runs[-1].wait() == 0, runs[-1].stderr
    first, second = (run.stdout for run in runs)
    assert first.count("prepared") == second.count("prepared") == 1
    assert ("loaded from the cache" in first, "loaded from the cache" in second) == (False, True)
    assert first.splitlines()[:-1] == second.splitlines()[:-1]


def test_a_run_shows_the_report_of_cached_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What was truncated or dropped is told at every start, not only by the process that prepared."""
    path = write_tiny(tmp_path, "classification")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"text": "red cat " * 40, "label": "animal"}) + "\n")
    loaded = load_recipe(str(path), [f"data.cache_dir={tmp_path}/cache"])
    assert not prepare(loaded.recipe, loaded.base).from_cache
    caplog.set_level("INFO", logger="ptft")
    Session(loaded, place())
    (report,) = [message for message in caplog.messages if message.startswith("train:")]
    assert "1 row truncated to data.max_length" in report
    assert "loaded from the cache" in report
