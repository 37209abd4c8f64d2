"""The tokenizer of `prepare`: trained once, and reused from a copy with another cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from prepare_support import all_ids, prepare, recipe, save_tokenizer, write_text
from tiny import write_tiny

from ptft_dist.api import load_recipe
from ptft_dist.config.recipe import Recipe
from ptft_dist.data import prepare as module
from ptft_dist.data import tokenizer_provider
from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.registry import recipe_class

WORDPIECE = {"algorithm": "wordpiece", "vocab_size": 300}


def forbid_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    def learn(*_: Any) -> Any:
        raise AssertionError("a tokenizer was learned again")

    monkeypatch.setattr(tokenizer_provider, "train_tokenizer", learn)


def test_another_cache_uses_the_tokenizer_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learned again by another library version, it may have other ids: the rows of a resumed run would be nonsense."""
    base = write_text(tmp_path)
    first = prepare(recipe(WORDPIECE), base)
    shutil.copytree(first.tokenizer_path, base / "run/tokenizer")
    forbid_learning(monkeypatch)
    wanted = recipe(WORDPIECE, cache_dir="other")
    again = prepare(wanted, base, tokenizer_from=base / "run/tokenizer")
    assert not again.from_cache
    assert again.fingerprint == first.fingerprint
    assert again.tokenizer_path == base / "run/tokenizer"
    assert all_ids(again.train) == all_ids(first.train)
    assert prepare(wanted, base, tokenizer_from=base / "run/tokenizer").from_cache
    assert prepare(recipe(WORDPIECE), base, tokenizer_from=base / "run/tokenizer").from_cache


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("sft", {}),  # the chat template is saved with it
        ("classification", {"tokenizer": {"train": {"vocab_size": 320}, "add": ["zebra"]}}),
    ],
)
def test_a_learned_tokenizer_with_additions_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, changes: dict[str, Any]
) -> None:
    path = str(write_tiny(tmp_path, task, **changes))
    ours, other = (load_recipe(path, [f"data.cache_dir={name}"]).recipe for name in ("one", "two"))
    first = prepare(ours, tmp_path)
    shutil.copytree(first.tokenizer_path, tmp_path / "run/tokenizer")
    forbid_learning(monkeypatch)
    again = prepare(other, tmp_path, tokenizer_from=tmp_path / "run/tokenizer")
    assert (again.from_cache, again.fingerprint) == (False, first.fingerprint)


@pytest.mark.parametrize("cached", [True, False], ids=["plain", "with additions"])
def test_another_tokenizer_makes_another_store(tmp_path: Path, cached: bool) -> None:
    changes = {} if cached else {"tokenizer": {"train": {"vocab_size": 320}, "add": ["zebra"]}}
    ours = load_recipe(str(write_tiny(tmp_path, "classification", **changes)), ["data.cache_dir=cache"]).recipe
    first = prepare(ours, tmp_path)
    shutil.copytree(first.tokenizer_path, tmp_path / "changed")
    file = tmp_path / "changed/tokenizer.json"
    state = json.loads(file.read_text())
    vocabulary = state["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    file.write_text(json.dumps(state))
    again = prepare(ours, tmp_path, tokenizer_from=tmp_path / "changed")
    assert not again.from_cache
    assert again.fingerprint != first.fingerprint


def test_no_effect_on_a_tokenizer_that_is_loaded(tmp_path: Path) -> None:
    base = write_text(tmp_path)
    given = save_tokenizer(base / "given")
    save_tokenizer(base / "other")
    prepared = prepare(recipe(given), base, tokenizer_from=base / "other")
    assert prepared.tokenizer_path == given


def test_a_directory_that_is_no_tokenizer(tmp_path: Path) -> None:
    base = write_text(tmp_path)
    (base / "empty").mkdir()
    with pytest.raises(RecipeError, match="cannot load a tokenizer from"):
        prepare(recipe(WORDPIECE), base, tokenizer_from=base / "empty")


# --- fingerprints: what must not be forgotten ------------------------------------------------------------------------


def of_task(task: str, model_type: str) -> Recipe:
    raw = recipe({"vocab_size": 300}).model_dump(exclude_unset=True)
    raw |= {"task": task, "model": {"config": {"model_type": model_type}}}
    raw.pop("clm", None)
    return recipe_class().model_validate(raw)


def test_an_added_token_does_not_get_the_id_of_another_one(tmp_path: Path) -> None:
    """The ids of this tokenizer have a gap, and `tokenizers` counts tokens to find the next id."""
    file = save_tokenizer(write_text(tmp_path) / "words") / "tokenizer.json"
    state = json.loads(file.read_text())
    last = max(state["model"]["vocab"], key=state["model"]["vocab"].get)
    state["model"]["vocab"][last] += 1
    file.write_text(json.dumps(state))
    ours = recipe(file.parent)
    added = ours.tokenizer.model_copy(update={"add": ("wizardry",)})
    with pytest.raises(RecipeError, match=f"tokenizer: 'wizardry' would get the id 300, which {last!r} has"):
        prepare(ours.model_copy(update={"tokenizer": added}), tmp_path)


def test_two_tasks_over_one_source_learn_with_their_own_special_tokens(tmp_path: Path) -> None:
    base = write_text(tmp_path)
    causal = prepare(of_task("clm", "llama"), base)
    masked = prepare(of_task("mlm", "bert"), base)
    assert load_tokenizer(causal.tokenizer_path).mask_token is None
    assert load_tokenizer(masked.tokenizer_path).mask_token is not None


def test_bad_rows_that_were_skipped_are_not_found_when_they_must_stop(tmp_path: Path) -> None:
    from ptft_dist.errors import DataError

    path = write_tiny(tmp_path, "classification")
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "red cat"}\n')
    words = prepare(load_recipe(str(path), ["data.bad_rows=skip", "data.cache_dir=a"]).recipe, tmp_path).tokenizer_path
    given = ["data.cache_dir=b", "tokenizer={path: " + str(words) + "}"]  # else the tokenizer's fingerprint differs
    prepare(load_recipe(str(path), [*given, "data.bad_rows=skip"]).recipe, tmp_path)
    with pytest.raises(DataError, match=r"rows\.jsonl:161"):
        prepare(load_recipe(str(path), given).recipe, tmp_path)


def test_other_columns_are_other_labels(tmp_path: Path) -> None:
    rows = [{"text": f"red cat {i}", "a": f"a{i % 2}", "b": f"b{i % 3}"} for i in range(60)]
    path = write_tiny(tmp_path, "classification")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for column in ("a", "b"):
        raw = json.loads(path.read_text())
        raw["data"] |= {"train": [{"path": "rows.jsonl", "fields": {"label": column}}], "cache_dir": "cache"}
        found[column] = prepare(recipe_class().model_validate(raw), tmp_path).survey["labels"]
    assert found == {"a": ["a0", "a1"], "b": ["b0", "b1", "b2"]}


@pytest.mark.parametrize("library", ["transformers", "trl"])
def test_rows_of_conversations_follow_the_libraries_that_render_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    ours = load_recipe(str(write_tiny(tmp_path, "sft")), ["data.cache_dir=cache"]).recipe
    words = prepare(ours, tmp_path).tokenizer_path
    ours = load_recipe(str(tmp_path / "recipe.yaml"), ["data.cache_dir=cache", f"tokenizer={{path: {words}}}"]).recipe
    first = prepare(ours, tmp_path)
    assert prepare(ours, tmp_path).from_cache
    known = module.version
    monkeypatch.setattr(module, "version", lambda name: "999.0" if name == library else known(name))
    assert prepare(ours, tmp_path).fingerprint != first.fingerprint
