"""`ptft data inspect`: numbers against naive counts, in the terminal and on the page."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from preloaded_ranks import forked_ptft
from support import write_recipe
from tiny import write_tiny
from transformers import ByT5Tokenizer

from ptft_dist.api import inspect_data, prepare, verify_data
from ptft_dist.data.inspection import Inspection
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.pages.data_page import text_of, write_page

ENGLISH = "The committee met on a cold morning and agreed that the old bridge has to be repaired before winter number"
CHINESE = "委员会在一个寒冷的早晨开会，同意在冬天之前修好那座旧桥，编号"
EVIL = "<script>alert(1)</script> & <b>bold</b>"


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PTFT_CACHE", str(tmp_path / "cache"))
    english = [f"{ENGLISH} {i}  {EVIL if i == 3 else ''}" for i in range(30)]
    chinese = [CHINESE + str(i) for i in range(10)]
    for name, texts in (("en", [*english, english[0]]), ("zh", chinese)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = {
        "train": [{"path": "en.jsonl", "name": "english"}, {"path": "zh.jsonl"}],
        "validation": None,
        "steps": ["whitespace", "exact_dedup"],
    }
    return write_recipe(tmp_path, tmp_path, data=data, eval={"every": None}, clm={"packing": True})


def test_the_numbers_are_those_of_a_naive_count(recipe: Path) -> None:
    found = inspect_data(str(recipe), samples=3)
    prepared = prepare(str(recipe))
    (store,) = found.stores
    rows = [prepared.train.row(i) for i in range(len(prepared.train))]
    ids = [token for row in rows for token in row.input_ids.tolist()]
    starts = [i for i, token in enumerate(ids) if i == 0 or ids[i - 1] == 0]  # after an EOS
    lengths = [stop - start for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
    assert (store.rows, store.tokens, store.unit) == (len(rows), len(ids), "documents")
    assert len(lengths) == 40
    for first, last, count in store.histogram:
        assert count == sum(first <= length <= last for length in lengths)
    assert sum(count for _, _, count in store.histogram) == 40
    assert (store.quantiles["shortest"], store.quantiles["longest"]) == (min(lengths), max(lengths))
    assert store.filled == pytest.approx(len(ids) / (len(rows) * 64))
    assert store.documents_per_row == pytest.approx(40 / len(rows))
    assert [number for number, _ in store.samples] == [0, (len(rows) - 1) // 2, len(rows) - 1]
    assert store.samples[0][1].startswith(ENGLISH[:20])
    assert {source: list(languages) for source, languages in found.languages.items()} == {
        "train[0]": ["en"],
        "train[1]": ["zh"],
    }
    assert found.languages["train[1]"]["zh"][0] == 10
    assert found.report.sources["train[0]"].records == 30
    assert sum(each.tokens for each in found.report.sources.values()) == len(ids)


def test_text_and_page_have_all_of_it_and_run_nothing(recipe: Path, tmp_path: Path) -> None:
    found = inspect_data(str(recipe))
    page = write_page(found, tmp_path / "page.html").read_text()
    text = text_of(found)
    for shown in (text, html.unescape(page)):
        for part in (
            "english",
            "zh.jsonl",
            "exact_dedup of 41: dropped 1 (1 x duplicate)",
            ENGLISH,
            "packing efficiency",
        ):
            assert part in shown
    assert "exact_dedup dropped: duplicate (1)" in text
    assert "<script" not in page
    assert html.escape(EVIL[:20]) in page
    assert not re.findall(r"(?:src|href)=|https?://", page)


def test_a_directory_of_stores_is_enough(recipe: Path) -> None:
    prepared = prepare(str(recipe))
    root = prepared.train.path.parent
    expected = inspect_data(str(recipe))
    for path in (root, root / "train"):
        found = inspect_data(path)
        assert (found.stores, found.report) == (expected.stores, expected.report)
        assert found.languages == {}
    with pytest.raises(RecipeError, match="prepared data cannot be changed"):
        inspect_data(root, ["data.max_length=9"])
    (root / "report.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        inspect_data(root)


@pytest.mark.parametrize("task", ["classification", "seq2seq"])
def test_rows_of_examples(tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PTFT_CACHE", str(tmp_path / "cache"))
    found: Inspection = inspect_data(str(write_tiny(tmp_path, task)))
    assert {store.unit for store in found.stores} == {"rows"}
    assert all(store.samples for store in found.stores)
    assert (" -> " in text_of(found)) == (task == "seq2seq")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    roles = {"classification": ["text"], "seq2seq": ["source", "target"]}[task]
    size_bytes = sum(len(row[role].encode()) for row in rows for role in roles)
    assert sum(side.text_bytes for side in found.report.sides.values()) == size_bytes


def test_a_tokenizer_without_a_fast_version(recipe: Path, tmp_path: Path) -> None:
    """A token of ByT5 is a byte."""
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    found = inspect_data(str(recipe), ["tokenizer={path: byt5}"], samples=1)
    chinese = sum(len((CHINESE + str(i)).encode()) for i in range(10))
    assert found.languages["train[1]"] == {"zh": (10, chinese)}
    assert found.stores[0].samples[0][1].startswith(ENGLISH[:20])


def test_the_command(recipe: Path, tmp_path: Path) -> None:
    done = forked_ptft("data", "inspect", str(recipe), "--html", "page.html", "--samples", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "page: page.html" in done.stdout
    assert (tmp_path / "page.html").is_file()
    wrong: Any = forked_ptft("data", "inspect", str(tmp_path / "nothing"), cwd=tmp_path)
    assert (wrong.returncode, "nothing" in wrong.stderr) == (2, True)


def test_changed_bytes_are_found(recipe: Path, tmp_path: Path) -> None:
    root = prepare(str(recipe)).train.path.parent
    done = forked_ptft("data", "verify", str(recipe), cwd=tmp_path)
    assert (done.returncode, done.stdout.count("unchanged")) == (0, 1)
    tokens = root / "train/tokens.bin"
    contents = bytearray(tokens.read_bytes())
    contents[7] ^= 1
    tokens.write_bytes(contents)
    for given in (root, root / "train"):
        with pytest.raises(DataError, match=r"the contents of tokens\.bin have changed"):
            verify_data(given)
    summary = json.loads((root / "train/store.json").read_text())
    del summary["checksums"]
    (root / "train/store.json").write_text(json.dumps(summary))
    with pytest.raises(DataError, match="without checksums"):
        verify_data(root)
