"""Data augmentation: what and how much changes, that it depends on seed and row only, and the data report."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from preloaded_ranks import forked_ptft
from prepare_support import prepare
from transformers import T5Config, T5ForConditionalGeneration

from ptft_dist.api import load_recipe
from ptft_dist.config.recipe import Augmentation, Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.augment import Augmentations, changed, read_synonyms
from ptft_dist.data.example_store import ExampleStore
from ptft_dist.data.formats import Record
from ptft_dist.data.prepare import Prepared
from ptft_dist.data.tokenizer import load_tokenizer, train_tokenizer
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.reporting import messages as reporting
from ptft_dist.reporting.messages import messages
from ptft_dist.tasks.registry import recipe_class

SYNONYMS = "cat\tfeline,pussy cat\nold\tancient\n# a remark\n\nhouse\thome\n"
TEXTS = [
    f"the {a} cat sees number {i} of a house, and the dog {b} here" for i in range(6) for a in "xyz" for b in "uvw"
]


def recipe(*methods: dict[str, Any], seed: int = 0, task: str = "classification", **changes: Any) -> Recipe:
    raw = {
        "task": task,
        "model": {"config": {"model_type": "bert"}},
        "tokenizer": {"train": {"vocab_size": 320}},
        "data": {"train": [{"path": "rows.jsonl"}], "validation": 0.2, "max_length": 64, "cache_dir": "cache"},
        "batch": {"global_size": 1, "micro_size": 1},
        "train": {"max_steps": 1, "seed": seed},
        "run_dir": "run",
    } | changes
    raw["data"] = {**raw["data"], "augment": list(methods)}
    return recipe_class().model_validate_json(json.dumps(raw), strict=True)


def rows(texts: list[str]) -> list[Record]:
    return [Record({"text": text, "label": f"l{i % 2}"}, f"rows.jsonl:{i + 1}") for i, text in enumerate(texts)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    lines = [json.dumps({"text": text, "label": f"l{i % 2}"}) for i, text in enumerate([*TEXTS, "word", "yes"])]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path


METHODS: dict[str, dict[str, Any]] = {
    "synonym": {"method": "synonym", "synonyms": "synonyms.txt", "share": 0.3, "copies": 2},
    "swap": {"method": "swap", "copies": 2, "share": 0.4},
    "delete": {"method": "delete", "copies": 2, "share": 0.3},
}


@pytest.mark.parametrize("name", METHODS)
def test_copies_follow_from_seed_and_row_alone(folder: Path, name: str) -> None:
    records = rows(TEXTS)
    one = Augmentations(recipe(METHODS[name]), folder)
    forward = {record.where: list(one.copies(record)) for record in records}
    other = Augmentations(recipe(METHODS[name]), folder)
    backward = {record.where: list(other.copies(record)) for record in reversed(records)}
    together = dict(zip(forward, Augmentations(recipe(METHODS[name]), folder).copies_of(records), strict=True))
    assert forward == backward == together
    reseeded = Augmentations(recipe(METHODS[name], seed=1), folder)
    assert {record.where: list(reseeded.copies(record)) for record in records} != forward
    second = Augmentations(recipe({"method": "delete", "share": 1.0}, METHODS[name]), folder)
    later = {record.where: [copy.values for copy in list(second.copies(record))[1:]] for record in records}
    assert later != {where: [copy.values for copy in copies] for where, copies in forward.items()}  # by its place
    for record in records:
        copies = forward[record.where]
        assert [copy.where for copy in copies] == [f"{record.where} (copy {i})" for i in range(1, len(copies) + 1)]
        assert all(copy.values["label"] == record.values["label"] for copy in copies)
        texts = [copy.values["text"] for copy in copies]
        assert record.values["text"] not in texts
        assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 1.0])
def test_the_share_of_changed_words(share: float) -> None:
    """Of 40 words, this fraction, rounded down, is changed; at least one word."""
    import random

    words = [f"w{i}" for i in range(40)]
    text, expected = " ".join(words), max(1, int(share * 40))
    known = {word: [f"{word}s"] for word in words}
    for i in range(20):
        chance = random.Random(i)
        replaced = changed(text, Augmentation(method="synonym", synonyms="x", share=share), known, chance).split()
        assert sum(a != b for a, b in zip(words, replaced, strict=True)) == expected
        kept = changed(text, Augmentation(method="delete", share=share), {}, chance).split()
        assert len(kept) == max(1, 40 - expected)
        assert kept == [word for word in words if word in kept]  # in their order
        swapped = changed(text, Augmentation(method="swap", share=share), {}, chance).split()
        assert Counter(swapped) == Counter(words)
        assert sum(a != b for a, b in zip(words, swapped, strict=True)) == 2 * max(1, expected // 2)


def test_punctuation_spaces_and_capitals_stay() -> None:
    import random

    synonym = Augmentation(method="synonym", synonyms="x", share=1.0)
    known = {"cat": ["lynx"], "old": ["aged"], "OLD": ["AGED"]}
    text = '"Cat,"  said the (old)\n\tOLD  cat.'
    assert changed(text, synonym, known, random.Random(0)) == '"Lynx,"  said the (aged)\n\tAGED  lynx.'
    assert changed("  dog  ", synonym, known, random.Random(0)) == "  dog  "
    character = Augmentation(method="synonym", synonyms="x", share=1.0, unit="character")
    assert changed("小猫。", character, {"小": ["大"]}, random.Random(0)) == "大猫。"
    swap = Augmentation(method="swap", unit="character")
    assert changed("ab c", swap, {}, random.Random(0)) in {"ba c", "cb a", "ac b"}
    assert changed("one", Augmentation(method="delete"), {}, random.Random(0)) == "one"
    assert changed("a a a", Augmentation(method="swap"), {}, random.Random(0)) == "a a a"


def test_pairs_are_the_first_that_differ() -> None:
    """Of all pairs of free places in the order drawn, the first of different words: here they are all looked at."""
    import random
    from itertools import combinations

    for seed in range(200):
        source = random.Random(seed)
        words = source.choices("aaaab" if seed % 2 else "abc", k=source.randint(2, 12))
        expected, count = list(words), max(1, int(0.8 * len(words)))
        free = random.Random(seed).sample(range(len(words)), len(words))
        for _ in range(max(1, count // 2)):
            if pair := next((p for p in combinations(free, 2) if expected[p[0]] != expected[p[1]]), None):
                expected[pair[0]], expected[pair[1]] = expected[pair[1]], expected[pair[0]]
                free = [i for i in free if i not in pair]
        swap = Augmentation(method="swap", unit="character", share=0.8)
        assert changed("".join(words), swap, {}, random.Random(seed)) == "".join(expected)


def test_a_long_text_of_one_word_costs_no_more_than_others() -> None:
    import random
    import time

    before = time.monotonic()
    assert changed("a" * 50_000, Augmentation(method="swap", unit="character"), {}, random.Random(0)) == "a" * 50_000
    assert time.monotonic() - before < 5  # looking at all pairs takes minutes


def test_both_texts_of_a_pair(folder: Path) -> None:
    pair = recipe({"method": "swap"}, classification={"pair": True})
    record = Record({"text": "one two three", "text_pair": "four five six", "label": "x"}, "here")
    (copy,) = Augmentations(pair, folder).copies(record)
    for role in ("text", "text_pair"):
        assert copy.values[role] != record.values[role]
        assert sorted(copy.values[role].split()) == sorted(record.values[role].split())
    alone = Augmentations(recipe({"method": "swap"}), folder)
    assert [c.values["text_pair"] for c in alone.copies(record)] == ["four five six"]  # a column like any other


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("cat feline\n", "synonyms.txt:1: expected a word, a tab, and its synonyms"),
        ("old\tancient\n\ncat\tlynx,,puma\n", "synonyms.txt:3: expected"),
        ("\tlynx\n", "synonyms.txt:1: expected"),
        ("cat\tlynx\ncat\tpuma\n", "synonyms.txt:2: 'cat' already has a line above"),
        ("# nothing\n", "synonyms.txt: the file has no synonyms"),
        ("cat\tl\xff\n", "synonyms.txt:1: this is not UTF-8"),
    ],
)
def test_a_broken_file_of_synonyms(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "synonyms.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=says.replace("(", r"\(")):
        read_synonyms(tmp_path / "synonyms.txt")


def test_broken_settings_end_with_their_exit_codes(folder: Path) -> None:
    raw = recipe(METHODS["synonym"] | {"synonyms": "nowhere.txt"}).model_dump(mode="json", exclude_none=True)
    raw = {key: raw[key] for key in ("task", "model", "tokenizer", "data", "batch", "train", "run_dir")}
    raw["batch"] = {"global_size": 1, "micro_size": 1}
    raw["train"] = {"max_steps": 1}
    (folder / "recipe.yaml").write_text(json.dumps(raw))
    ended = forked_ptft("prepare", "recipe.yaml", cwd=folder)
    assert ended.returncode == 3
    assert "nowhere.txt" in ended.stderr
    assert "recipe's directory" in ended.stderr
    for extra, says in (
        ({"method": "swap", "synonyms": "x"}, "synonyms has no effect"),
        ({"method": "synonym"}, "needs a file of synonyms"),
        ({"method": "back_translation", "forward": "a"}, "a model for each direction"),
        ({"method": "back_translation", "forward": "a", "backward": "b", "copies": 2}, "copies has no effect"),
    ):
        with pytest.raises(ValueError, match=says):
            recipe(extra)
    with pytest.raises(ValueError, match=r"augment: has no effect"):
        recipe({"method": "swap"}, classification={"entities": True})


def texts_of(store: Any, prepared: Prepared) -> list[str]:
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    return [tokenizer.decode(store.row(i).input_ids, skip_special_tokens=True) for i in range(len(store))]


def test_prepare_counts_and_leaves_validation_alone(folder: Path) -> None:
    plain = prepare(recipe(), folder)
    prepared = prepare(recipe({"method": "swap", "copies": 2}), folder)
    assert prepared.report.read == len(TEXTS) + 2
    assert prepared.report.validation == plain.report.validation
    assert isinstance(prepared.validation, ExampleStore)
    assert texts_of(prepared.validation, prepared) == texts_of(plain.validation, plain)
    before, after = texts_of(plain.train, plain), texts_of(prepared.train, prepared)
    single = [text for text in before if len(text.split()) == 1]
    (step,) = prepared.report.steps
    notes = step.notes
    assert single
    assert notes["not augmented: no word can be changed (swap)"].times == len(single)
    copied = notes["augmented (swap)"].times
    assert copied + len(single) == len(before)  # each of two copies came out different
    assert len(after) == len(before) + 2 * copied
    assert Counter(before) - Counter(after) == Counter()
    assert {" ".join(sorted(text.split())) for text in after} == {" ".join(sorted(text.split())) for text in before}


def test_the_cache_follows_settings_and_files(folder: Path) -> None:
    def name(base: Path = folder, seed: int = 0, **changes: Any) -> str:
        return prepare(recipe(METHODS["synonym"] | changes, seed=seed), base).fingerprint

    first = name()
    different = {first, name(copies=1), name(share=0.5), name(seed=1), prepare(recipe(), folder).fingerprint}
    assert name() == first
    (folder / "synonyms.txt").write_text(SYNONYMS.replace("ancient", "antique"))
    different.add(name())
    assert len(different) == 6
    (folder / "copy.txt").write_text(SYNONYMS)
    assert name(synonyms="copy.txt") == first  # wherever it lies


@pytest.fixture(scope="module")
def translators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tiny random T5 models with a tokenizer: `there` and `back`."""
    import torch

    base = tmp_path_factory.mktemp("translators")
    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=300), TEXTS, ("eos", "pad"))
    for seed, name in enumerate(("there", "back")):
        torch.manual_seed(seed)
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": len(tokenizer)}
        special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = T5Config(**sizes, **special, decoder_start_token_id=tokenizer.pad_token_id)
        T5ForConditionalGeneration(config).save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
    return base


def test_back_translation_is_that_of_the_models(
    translators: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal to transformers' generate for each text alone: batches and padding do not matter."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    method = {"method": "back_translation", "forward": "there", "backward": "back"}
    augmenter = Augmentations(recipe(method), translators)
    records = rows([*TEXTS[:5], "short"])
    monkeypatch.setattr(reporting, "PLAIN_EVERY_S", -1.0)
    with messages():
        copies = augmenter.copies_of(records)
    assert re.search(r"back-translation: 6 texts, \d+:\d\d", capsys.readouterr().err)
    for record, made in zip(records, copies, strict=True):
        text = record.values["text"]
        for name in ("there", "back"):
            tokenizer = AutoTokenizer.from_pretrained(translators / name)
            model = AutoModelForSeq2SeqLM.from_pretrained(translators / name).eval()
            ids = tokenizer(text, return_tensors="pt").input_ids
            longest = 2 * ids.shape[1] + 10
            written = model.generate(ids, do_sample=False, num_beams=1, max_new_tokens=longest)
            text = tokenizer.decode(written[0], skip_special_tokens=True).strip()
        if text and text != record.values["text"]:
            assert made[0].values["text"] == text
            assert made[0].where == f"{record.where} (copy 1)"
        else:
            assert made == []
    assert sum(entry.times for entry in augmenter.notes.entries.values()) == len(records)
    assert list(Augmentations(recipe(method), translators).copies(records[0])) == copies[0]


def test_a_model_that_is_not_there(translators: Path) -> None:
    with pytest.raises(RecipeError, match=r"there is no directory \./nowhere"):
        Augmentations(recipe({"method": "back_translation", "forward": "./nowhere", "backward": "back"}), translators)


def test_a_translator_of_many_languages(translators: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NLLB translates into a language that its caller names; data.augment has no key for it."""
    from transformers import AutoTokenizer, NllbTokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _name: NllbTokenizer())
    method = {"method": "back_translation", "forward": "there", "backward": "back"}
    with pytest.raises(RecipeError, match=r"data\.augment: forward: .* marks texts with their language"):
        Augmentations(recipe(method), translators).copies_of(rows(TEXTS[:1]))


def test_the_cache_follows_the_translators(translators: Path, tmp_path: Path) -> None:
    """The data are prepared again if a translation model changes."""
    import shutil

    shutil.copytree(translators, tmp_path, dirs_exist_ok=True)
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": text, "label": f"l{i % 2}"}) for i, text in enumerate(TEXTS[:8]))
    )
    ours = recipe({"method": "back_translation", "forward": "there", "backward": "back"})
    first = prepare(ours, tmp_path)
    assert first.report.validation is not None
    assert first.report.train.examples > first.report.read - first.report.validation.examples
    assert prepare(ours, tmp_path).from_cache
    config = json.loads((tmp_path / "back/config.json").read_text())
    (tmp_path / "back/config.json").write_text(json.dumps(config | {"dropout_rate": 0.2}))
    assert prepare(ours, tmp_path).fingerprint != first.fingerprint


def test_load_recipe_takes_it(folder: Path) -> None:
    raw = {
        "task": "classification",
        "model": {"config": {"model_type": "bert"}},
        "tokenizer": {"train": {}},
        "data": {"train": [{"path": "rows.jsonl"}], "augment": [{"method": "delete"}]},
        "batch": {"global_size": 1, "micro_size": 1},
        "train": {"max_steps": 1},
        "run_dir": "run",
    }
    (folder / "recipe.yaml").write_text(json.dumps(raw))
    assert load_recipe(str(folder / "recipe.yaml")).recipe.data.augment[0].method == "delete"
