"""`ptft tokenizer`: the tokenizer of `prepare` as a directory of its own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from prepare_support import DOCUMENTS
from support import make_recipe, start
from tiny import write_tiny
from transformers import AutoTokenizer

from ptft_dist import api
from ptft_dist.data import prepare as preparing
from ptft_dist.data import trained_tokenizer as module
from ptft_dist.data.trained_tokenizer import describe
from ptft_dist.errors import RecipeError


@pytest.fixture
def recipe(tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTFT_CACHE", str(tmp_path / "cache"))
    return make_recipe(documents, train={"max_steps": 1}, eval={"every": None}, save={"every": None})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def forbid_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(*_: Any) -> Any:
        raise AssertionError("a tokenizer was learned again")

    monkeypatch.setattr(preparing, "train_tokenizer", learn)


def test_it_is_the_tokenizer_of_the_run(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Before and after the training, which replaces RUN_DIR/tokenizer with the same bytes."""
    report = api.train_tokenizer(recipe)
    assert (report.directory, report.written) == (tmp_path / "run/tokenizer", True)
    before = files(report.directory)
    api.train(recipe, quiet=True)
    assert files(tmp_path / "run/tokenizer") == before
    assert not api.train_tokenizer(recipe).written
    api.train(recipe, {"run_dir": "second"}, quiet=True)
    assert files(tmp_path / "second/tokenizer") == before
    assert not api.train_tokenizer(recipe, {"run_dir": "second"}).written  # written by a run, from the same cache
    assert (tmp_path / "second/tokenizer.report.json").is_file()


def test_the_report_is_a_plain_count(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The validation documents are those of a separate file; tokens are counted with transformers, text by text."""
    validation = tmp_path / "validation.txt"
    validation.write_text("\n".join([*DOCUMENTS, "snow in Zürich ☃"]))
    overrides = {"data.validation": [{"path": str(validation), "document": "line"}]}
    report = api.train_tokenizer(recipe, overrides, out=tmp_path / "own")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "own")
    assert report.vocabulary == len(tokenizer.get_vocab())
    assert report.special_tokens["eos_token"] == tokenizer.eos_token == "<|endoftext|>"
    for path, side in ((Path(recipe["data"]["train"][0]["path"]), report.train), (validation, report.validation)):
        texts = path.read_text().splitlines()
        assert side is not None
        assert side.bytes == sum(len(text.encode()) for text in texts)
        assert side.tokens == sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    written = json.loads((tmp_path / "own.report.json").read_text())
    assert written["train"]["bytes_per_token"] == pytest.approx(report.train.bytes / report.train.tokens, abs=1e-4)  # type: ignore[union-attr]


def test_a_fraction_is_measured_apart(recipe: dict[str, Any], documents: Path) -> None:
    report = api.train_tokenizer(recipe, {"data.validation": 0.3})
    assert report.train is not None
    assert report.validation is not None
    total = sum(len(text.encode()) for text in documents.read_text().splitlines())
    assert report.train.bytes + report.validation.bytes == total
    assert 0.1 * total < report.validation.bytes < 0.5 * total


def test_only_the_beginning_of_large_data_is_measured(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEASURED_BYTES", 500)
    side = api.train_tokenizer(recipe, {"data.validation": None, "eval": {}}).train
    assert side is not None
    assert 500 <= side.bytes < 500 + 90 * 8  # up to a whole document


def test_unknown_tokens_are_counted(recipe: dict[str, Any], tmp_path: Path) -> None:
    validation = tmp_path / "validation.txt"
    validation.write_text("☃ ☃\nabc\n")
    overrides = {"data.validation": [{"path": str(validation), "document": "line"}]}
    overrides |= {"tokenizer.train": {"algorithm": "wordpiece", "vocab_size": 300}}
    report = api.train_tokenizer(recipe, overrides)
    assert report.validation is not None
    assert report.validation.unknown_tokens == 2


def test_the_same_again_does_nothing(recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With another cache too."""
    overrides = {"tokenizer.train": {"algorithm": "wordpiece", "vocab_size": 300}}
    first = api.train_tokenizer(recipe, overrides, out="own")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("own*")}
    forbid_learning(monkeypatch)
    monkeypatch.setenv("PTFT_CACHE", str(tmp_path / "other"))
    again = api.train_tokenizer(recipe, overrides, out="own")
    assert (first.written, again.written) == (True, False)
    assert again.train == first.train
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("own*")} == before


@pytest.mark.parametrize("change", ["settings", "data", "damaged", "foreign", "file"])
def test_another_one_is_not_replaced(recipe: dict[str, Any], tmp_path: Path, documents: Path, change: str) -> None:
    own, overrides = tmp_path / "own", {}
    if change not in ("foreign", "file"):
        api.train_tokenizer(recipe, out=own)
    if change == "settings":
        overrides["tokenizer.train.vocab_size"] = 300
    elif change == "data":
        (tmp_path / "less.txt").write_text("\n".join(documents.read_text().splitlines()[:100]))
        overrides["data.train"] = [{"path": str(tmp_path / "less.txt"), "document": "line"}]
    elif change == "damaged":
        (own / "tokenizer.json").write_text("{}")
    elif change == "foreign":
        own.mkdir()
        (own / "notes.txt").write_text("mine")
    else:
        own.write_text("mine")
    before = files(own) if own.is_dir() else own.read_bytes()
    with pytest.raises(RecipeError, match=r"own: already exists.*Remove it, or choose another directory with --out"):
        api.train_tokenizer(recipe, overrides, out=own)
    assert (files(own) if own.is_dir() else own.read_bytes()) == before


@pytest.mark.parametrize("moment", ["before the directory", "in the copy"])
def test_a_killed_start_leaves_nothing_in_the_way(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    class Killed(BaseException):
        pass

    def die(_source: Path, target: Path) -> None:
        if moment == "in the copy":
            target.mkdir()
            (target / "tokenizer.json").write_text("{")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copytree", die)
        with pytest.raises(Killed):
            api.train_tokenizer(recipe, out=tmp_path / "own")
    assert not (tmp_path / "own").exists()
    assert api.train_tokenizer(recipe, out=tmp_path / "own").written
    assert sorted(path.name for path in tmp_path.glob("*own*")) == ["own", "own.report.json"]


def naive_counts(tokenizer: Any, texts: list[str]) -> dict[str, int]:
    """Looks at each word and each of its characters; words are Latin letters and digits, or one Chinese character."""
    counts = dict.fromkeys(("bytes", "tokens", "unknown_tokens", "words", "word_tokens", "whole_words"), 0)
    for text in texts:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        counts["bytes"] += len(text.encode())
        counts["tokens"] += len(ids)
        counts["unknown_tokens"] += ids.count(tokenizer.unk_token_id)
        touching = set()
        for word in re.finditer(r"[a-zA-Zü0-9]+|[\u4e00-\u9fff]", text):
            own = {t for t, (a, b) in enumerate(spans) if set(range(a, b)) & set(range(*word.span()))}
            touching |= own
            counts["words"] += 1
            counts["whole_words"] += len(own) == 1 and ids[min(own)] != tokenizer.unk_token_id
        counts["word_tokens"] += len(touching)
    return counts


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_each_source_and_language_beside_another_tokenizer(
    recipe: dict[str, Any], tmp_path: Path, algorithm: str
) -> None:
    english = ["The quick brown fox jumps over the lazy dog, and it is happy in Zürich."] * 9
    chinese = ["我们今天去北京看了长城，明天再去上海。☃", "我们在北京"] * 5
    for name, texts in (("en.txt", english), ("zh.txt", chinese)):
        (tmp_path / name).write_text("\n".join(texts))
    api.train_tokenizer(recipe, out="other")
    overrides = {"data.train": [{"path": f"{tmp_path}/{name}", "document": "line"} for name in ("en.txt", "zh.txt")]}
    overrides |= {"data.validation": None, "eval": {}, "tokenizer.train": {"algorithm": algorithm, "vocab_size": 300}}
    api.train_tokenizer(recipe, overrides, out="own")
    again = api.train_tokenizer(recipe, overrides, out="own", compare=["other"])  # measured again, not written
    assert not again.written
    written = json.loads((tmp_path / "own.report.json").read_text())
    for name, values in (("own", written), ("other", written["compared"]["other"])):
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert values["vocabulary"] == len(tokenizer)
        assert values["validation"] is None
        train = values["train"]
        for group, texts in (
            (train["languages"]["en"], english),
            (train["languages"]["zh"], chinese),
            (train["sources"][f"{tmp_path}/en.txt"], english),
            (train["sources"][f"{tmp_path}/zh.txt"], chinese),
            (train, english + chinese),
        ):
            expected = naive_counts(tokenizer, texts)
            assert {key: group[key] for key in expected} == expected
            assert group["fertility"] == pytest.approx(expected["word_tokens"] / expected["words"], abs=1e-4)
            assert group["whole_words_share"] == pytest.approx(expected["whole_words"] / expected["words"], abs=1e-4)
            assert group["unknown_rate"] == pytest.approx(expected["unknown_tokens"] / expected["tokens"], abs=1e-6)
        assert train["languages"]["zh"]["fertility_unit"] == "tokens per character"
        assert train["languages"]["en"]["fertility_unit"] == "tokens per word"
    shown = describe(again)
    assert "other (" in shown
    assert "language zh" in shown
    assert "per character" in shown
    assert api.train_tokenizer(recipe, overrides, out="own", compare=["other"]).measured == again.measured


def test_a_tokenizer_to_compare_with_that_does_not_exist(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"--compare: cannot load a tokenizer from {tmp_path}/none"):
        api.train_tokenizer(recipe, compare=[f"{tmp_path}/none"])


@pytest.mark.parametrize("task", ["sft", "classification"])
def test_another_recipe_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    """With the added tokens and the chat template of the first recipe."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTFT_CACHE", str(tmp_path / "cache"))
    changes = {"tokenizer": {"train": {"vocab_size": 320}, "add": ["zebra"]}}
    path = str(write_tiny(tmp_path, task, **changes))
    report = api.train_tokenizer(path, out=tmp_path / "own")
    assert files(report.directory) == files(api.prepare(path).tokenizer_path)
    other = api.prepare(path, ["tokenizer={path: own}"])
    assert other.tokenizer_path == tmp_path / "own"
    assert len(AutoTokenizer.from_pretrained(other.tokenizer_path)) == report.vocabulary


def test_a_tokenizer_that_is_taken_as_it_is(recipe: dict[str, Any], tmp_path: Path) -> None:
    """It is measured, and nothing is written; with additions, the result is written."""
    own = api.train_tokenizer(recipe, out=tmp_path / "own")
    given = {"tokenizer": {"path": "own"}}
    report = api.train_tokenizer(recipe, given)
    assert (report.directory, report.written, report.train) == (None, False, own.train)
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError, match=r"--out: has no effect here: the recipe takes the tokenizer of own as it is"):
        api.train_tokenizer(recipe, given, out=tmp_path / "other")
    added = {"tokenizer": {"path": "own", "add": ["zebra"], "extend": {"tokens": 3}}}
    changed = api.train_tokenizer(recipe, added, out=tmp_path / "other")
    assert (changed.written, changed.vocabulary) == (True, own.vocabulary + 4)
    assert files(tmp_path / "other") == files(api.prepare(recipe, added).tokenizer_path)
    assert not api.train_tokenizer(recipe, added, out=tmp_path / "other").written


def test_folds_without_a_fold(recipe: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"data\.fold: required with data\.folds"):
        api.train_tokenizer(recipe, {"data.validation": None, "data.folds": 3})


def test_the_command(recipe: dict[str, Any], tmp_path: Path, cache: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for state in ("\n", "   (already there: same settings and data)\n"):
        done = start("tokenizer", "recipe.yaml", "--out", "own", cwd=tmp_path, cache=cache)
        assert done.wait() == 0, done.stderr
        assert f"tokenizer:   {tmp_path / 'own'}{state}" in done.stdout
        assert "bytes per token" in done.stdout
    done = start(
        "tokenizer", "recipe.yaml", "tokenizer.train.vocab_size=300", "--out", "own", cwd=tmp_path, cache=cache
    )
    assert done.wait() == 2
    assert "error: " in done.stderr
