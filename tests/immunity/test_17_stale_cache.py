"""17: prepared data are reused after a change of the tokenizer, its chat template, a setting or the text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare_support import prepare

from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data import prepare as module
from ptft_dist.data import tokenizer_provider
from ptft_dist.data.prepare import Prepared
from ptft_dist.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from ptft_dist.tasks.registry import recipe_class

TEXT = "\n".join(f"line {i} of a text that is the same for all" for i in range(50))
Change = Callable[[Path, dict[str, Any]], None]


def raw_recipe() -> dict[str, Any]:
    return {
        "task": "clm",
        "model": {"config": {"model_type": "llama"}},
        "tokenizer": {"path": "tokenizer"},
        "data": {
            "train": [{"path": "text.jsonl"}],
            "validation": 0.3,
            "max_length": 16,
            "cache_dir": "cache",
        },
        "clm": {},
        "batch": {"global_size": 1, "micro_size": 1},
        "train": {"max_steps": 1},
        "run_dir": "run",
    }


@pytest.fixture
def base(tmp_path: Path) -> Path:
    train_tokenizer(TokenizerTraining(vocab_size=280), TEXT.splitlines()).save_pretrained(tmp_path / "tokenizer")
    write_rows(tmp_path, TEXT)
    return tmp_path


def write_rows(base: Path, text: str) -> None:
    rows = [json.dumps({"text": line, "other": f"other {line}"}) for line in text.splitlines()]
    (base / "text.jsonl").write_text("\n".join(rows))


def run(base: Path, raw: dict[str, Any]) -> Prepared:
    return prepare(recipe_class().model_validate(raw), base)


def edit(section: str, key: str, value: Any) -> Change:
    return lambda _, raw: raw[section].__setitem__(key, value)


def edit_source(key: str, value: Any) -> Change:
    return lambda _, raw: raw["data"]["train"][0].__setitem__(key, value)


def edit_tokenizer(change: Callable[[Any], Any]) -> Change:
    def apply(base: Path, _: dict[str, Any]) -> None:
        tokenizer = load_tokenizer(base / "tokenizer")
        change(tokenizer)
        tokenizer.save_pretrained(base / "tokenizer")

    return apply


def change_a_letter(base: Path, _: dict[str, Any]) -> None:
    write_rows(base, TEXT.replace("line 7", "line 8"))  # the same length, a moment after the first version


CHANGES: dict[str, Change] = {
    "a letter of the text": change_a_letter,
    "the text column": edit_source("field", "other"),
    "the number of documents": edit_source("limit", 40),
    "the length of rows": edit("data", "max_length", 17),
    "packing": edit("clm", "packing", False),
    "bos": edit("clm", "bos", True),
    "the validation share": edit("data", "validation", 0.4),
    "validation sources": edit("data", "validation", [{"path": "text.jsonl", "limit": 3}]),
    "no validation": edit("data", "validation", None),
    "a source more": lambda _, raw: raw["data"]["train"].append({"path": "text.jsonl", "limit": 1}),
    "the chat template": edit_tokenizer(lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}")),
    "an added token": edit_tokenizer(lambda tokenizer: tokenizer.add_tokens(["line 1"])),
    "the end token": edit_tokenizer(lambda tokenizer: setattr(tokenizer, "eos_token", "<|pad|>")),
    "another tokenizer": lambda _, raw: raw.__setitem__("tokenizer", {"train": {"vocab_size": 270}}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_makes_a_new_store(base: Path, change: str) -> None:
    raw = raw_recipe()
    before = run(base, raw)
    assert run(base, raw).from_cache

    CHANGES[change](base, raw)
    after = run(base, raw)
    assert not after.from_cache
    assert after.fingerprint != before.fingerprint
    assert after.train.path != before.train.path
    assert run(base, raw).from_cache


@pytest.mark.parametrize("settings", [{"vocab_size": 275}, {"min_frequency": 9}, {"max_megabytes": 0.001}])
def test_other_training_settings_train_another_tokenizer(base: Path, settings: dict[str, Any]) -> None:
    raw = raw_recipe() | {"tokenizer": {"train": {"vocab_size": 280}}}
    before = run(base, raw)
    raw["tokenizer"] = {"train": {"vocab_size": 280} | settings}
    assert run(base, raw).tokenizer_path != before.tokenizer_path


def test_a_tokenizer_that_comes_out_otherwise_makes_a_new_store(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained again after the cache was lost, wordpiece gives other ids, so the old rows would be wrong."""
    raw = raw_recipe() | {"tokenizer": {"train": {"vocab_size": 280}}}
    before = run(base, raw)
    shutil.rmtree(before.tokenizer_path)
    learn = tokenizer_provider.train_tokenizer

    def learn_otherwise(*arguments: Any) -> Any:
        tokenizer = learn(*arguments)
        tokenizer.add_tokens(["line 1"])
        return tokenizer

    monkeypatch.setattr(tokenizer_provider, "train_tokenizer", learn_otherwise)
    after = run(base, raw)
    assert after.tokenizer_path == before.tokenizer_path
    assert not after.from_cache
    assert after.fingerprint != before.fingerprint


def test_another_share_trains_another_tokenizer(base: Path) -> None:
    """The tokenizer must not be trained on the new validation rows."""
    raw = raw_recipe() | {"tokenizer": {"train": {"vocab_size": 280}}}
    before = run(base, raw)
    raw["data"]["validation"] = 0.5
    assert run(base, raw).tokenizer_path != before.tokenizer_path


@pytest.mark.parametrize("name", ["version", "PREPARE_VERSION"])
def test_another_version_prepares_anew(base: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    raw = raw_recipe()
    run(base, raw)
    monkeypatch.setattr(module, name, (lambda _: "999.0") if name == "version" else 999)
    assert not run(base, raw).from_cache


def test_what_does_not_matter_makes_no_new_store(base: Path) -> None:
    raw = raw_recipe()
    before = run(base, raw)
    raw |= {"optim": {"lr": 1.0}, "run_dir": "elsewhere", "batch": {"global_size": 4, "micro_size": 2}}
    raw["clm"] = {"attention": "across"}
    (base / "tokenizer/model.safetensors").write_text("weights that were trained further")
    (base / "text.jsonl").rename(base / "moved.jsonl")
    raw["data"]["train"][0]["path"] = "moved.jsonl"
    after = run(base, raw)
    assert after.from_cache
    assert after.fingerprint == before.fingerprint


def test_the_tokenizer_fingerprint_follows_every_change(base: Path) -> None:
    changes: list[Callable[[Any], Any]] = [
        lambda _: None,
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
        lambda tokenizer: setattr(tokenizer, "eos_token", "<|pad|>"),
        lambda tokenizer: tokenizer.add_tokens(["line 1"]),
        lambda tokenizer: tokenizer.add_special_tokens({"unk_token": "<|unk|>"}),
    ]
    prints = set()
    for change in changes:
        tokenizer = load_tokenizer(base / "tokenizer")
        change(tokenizer)
        prints.add(tokenizer_fingerprint(tokenizer))
    assert len(prints) == len(changes)

    used = load_tokenizer(base / "tokenizer")
    used(["a", "b c"], truncation=True, max_length=1, padding=True)  # leaves its settings in the Rust tokenizer
    assert tokenizer_fingerprint(used) == tokenizer_fingerprint(load_tokenizer(base / "tokenizer"))
