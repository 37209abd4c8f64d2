"""Tokens that are learned from texts and added to a tokenizer, and their pieces."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prepare_support import DOCUMENTS, prepare, recipe, save_tokenizer, write_text
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerExtension, TokenizerTraining
from ptft_dist.data.tokenizer import load_tokenizer, train_tokenizer
from ptft_dist.data.tokenizer_extension import extend, learn_merges
from ptft_dist.data.tokenizer_files import ORIGIN, pieces_of, read_pieces
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.tasks.registry import recipe_class

SMOLLM = Path(os.environ.get("PTFT_TEST_MODELS", "")) / "smollm2-135m-instruct"
NEW = ["the electrocardiogram of tachycardia", "electrocardiograms, tachycardia and bradycardia"] * 5


def old(algorithm: str, **changes: Any) -> PreTrainedTokenizerFast:
    settings = TokenizerTraining.model_validate({"algorithm": algorithm, "vocab_size": 300} | changes)
    return train_tokenizer(settings, [*DOCUMENTS, "abcdefghijklmnopqrstuvwxyz,. a b c d e f g h i j k l m n o p q"])


def naive_merges(words: list[tuple[list[int], int]], names: dict[int, str], most: int, least: int, first: int) -> Any:
    """Counts all pairs again before each merge."""
    names, merges = dict(names), []
    while len(merges) < most:
        pairs: Counter[tuple[int, int]] = Counter()
        for ids, count in words:
            for pair in pairwise(ids):
                pairs[pair] += count
        known = set(names.values())
        possible = [(-n, pair) for pair, n in pairs.items() if names[pair[0]] + names[pair[1]] not in known]
        if not possible or -min(possible)[0] < least:
            break
        (a, b), new = min(possible)[1], first + len(merges)
        merges.append((a, b))
        names[new] = names[a] + names[b]
        replaced = []
        for ids, count in words:
            text = re.sub(rf"(?<!\d){a},{b}(?!\d)", str(new), ",".join(map(str, ids)))
            replaced.append(([int(each) for each in text.split(",")], count))
        words = replaced
    return merges


@pytest.mark.parametrize(("most", "least"), [(40, 1), (1000, 2), (1000, 8)])
def test_merges_are_those_of_a_naive_loop(most: int, least: int) -> None:
    counts = Counter(word for text in DOCUMENTS for word in [*text.split(), text[:9].replace(" ", "o")])
    names = {ord(letter) - 30: letter for letter in sorted({letter for word in counts for letter in word})}
    names[200] = "th"  # a token that no merge may make again
    words = [([ord(letter) - 30 for letter in word], count) for word, count in sorted(counts.items())]
    expected = naive_merges(words, names, most, least, 201)
    assert learn_merges(list(words), dict(names), most, least, 201) == expected
    assert len(expected) > 20


def test_bpe_goes_on_merging() -> None:
    """New texts have fewer tokens; each new token stands for what the old tokenizer makes of it, in any text."""
    before = old("bpe")
    after = extend(before, TokenizerExtension(tokens=25), NEW)
    assert len(after) == len(before) + 25
    assert {token: i for token, i in after.get_vocab().items() if i < len(before)} == before.get_vocab()
    pieces = pieces_of(before, after)
    assert sorted(pieces) == list(range(len(before), len(before) + 25))
    for text in [*NEW, *DOCUMENTS, "cardiology, 你好"]:
        short, long = (each(text, add_special_tokens=False)["input_ids"] for each in (after, before))
        assert [piece for token in short for piece in pieces.get(token, [token])] == long
        assert after.decode(short) == text
    assert len(after(NEW[1])["input_ids"]) < len(before(NEW[1])["input_ids"]) / 2


@pytest.mark.parametrize("algorithm", ["wordpiece", "unigram"])
def test_whole_words_that_save_most_tokens(algorithm: str) -> None:
    before = old(algorithm, vocab_size=260)
    mark = "▁" if algorithm == "unigram" else ""
    pattern = r"\S+" if algorithm == "unigram" else r"\w+|[^\w\s]"
    saved: Counter[str] = Counter()
    for text in NEW:
        for word in re.findall(pattern, text):
            ids = before(word, add_special_tokens=False)["input_ids"]
            if len(ids) > 1 and before.unk_token_id not in ids:
                saved[mark + word] += len(ids) - 1
    expected = [word for word, _ in sorted(saved.items(), key=lambda each: (-each[1], each[0]))][:4]
    after = extend(before, TokenizerExtension(tokens=4), NEW)
    assert after.convert_ids_to_tokens(range(len(before), len(after))) == expected
    for word in expected:
        word = word.removeprefix("▁")
        new, *_ = after(word, add_special_tokens=False)["input_ids"]
        assert pieces_of(before, after)[new] == before(word, add_special_tokens=False)["input_ids"]
    assert after(DOCUMENTS[0])["input_ids"] == before(DOCUMENTS[0])["input_ids"]


def test_a_unigram_word_wins_against_a_shorter_new_word_and_its_rest() -> None:
    """Otherwise the longer token would never occur in a text. With equal scores, rounding decides."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefghijklm", k=chance.randint(4, 9))) for _ in range(60)]
    words += [word + "".join(chance.choices("abcdefghijklm", k=chance.randint(1, 4))) for word in words]
    after = extend(old("unigram", vocab_size=260), TokenizerExtension(tokens=200), [" ".join(words)] * 2)
    new = [word for word in words if f"▁{word}" in after.get_vocab()]
    assert len(new) > 100
    assert [word for word in new if len(after(word, add_special_tokens=False)["input_ids"]) > 1] == []


def test_special_tokens_after_the_model_s_own_keep_their_ids() -> None:
    """As those of Llama 3; the library would number them after the new tokens."""
    before = old("bpe")
    before.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    after = extend(before, TokenizerExtension(tokens=5), NEW)
    assert {token: i for token, i in after.get_vocab().items() if i < len(before)} == before.get_vocab()
    assert after("<|b|>cat")["input_ids"] == before("<|b|>cat")["input_ids"]
    assert "<|b|>" in after.all_special_tokens


def test_two_processes_learn_the_same_tokens(tmp_path: Path) -> None:
    old("bpe").save_pretrained(tmp_path)
    code = (
        "from ptft_dist.data.tokenizer_extension import *; import sys\n"
        f"print(extend(load_tokenizer(sys.argv[1]), TokenizerExtension(tokens=30), {NEW!r}).backend_tokenizer.to_str())"
    )
    found = set()
    for run in range(2):
        env = os.environ | {"PYTHONHASHSEED": str(run), "RAYON_NUM_THREADS": str(1 + 2 * run)}
        words = [sys.executable, "-c", code, str(tmp_path)]
        found.add(subprocess.run(words, env=env, check=True, capture_output=True).stdout)
    assert len(found) == 1


def test_tokenizers_that_cannot_be_extended() -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(RecipeError, match="a WordLevel tokenizer of this kind cannot be extended"):
        extend(PreTrainedTokenizerFast(tokenizer_object=words), TokenizerExtension(tokens=2), NEW)
    whole = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    with pytest.raises(RecipeError, match="does not split texts into words"):
        extend(PreTrainedTokenizerFast(tokenizer_object=whole), TokenizerExtension(tokens=2), NEW)
    for kind in (LlamaTokenizer, GemmaTokenizer):  # with pre-tokenizers that do not split
        with pytest.raises(RecipeError, match="does not split texts into words"):
            extend(kind(), TokenizerExtension(tokens=2), ["a b a b"] * 5)
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(DataError, match="have no word that is split and occurs 2 times"):
        extend(PreTrainedTokenizerFast(tokenizer_object=whole), TokenizerExtension(tokens=2), ["c d"])


@pytest.mark.skipif(not SMOLLM.is_dir(), reason="PTFT_TEST_MODELS names no folder with smollm2-135m-instruct")
def test_smollm2_learns_medical_words() -> None:
    before = AutoTokenizer.from_pretrained(SMOLLM)
    after = extend(before, TokenizerExtension(tokens=20), NEW)
    pieces = pieces_of(before, after)
    assert "Ġelectrocardiogram" in after.get_vocab()
    for text in (*NEW, "<|im_start|>user\nA tachycardia?<|im_end|>"):
        long = before(text)["input_ids"]
        assert [piece for token in after(text)["input_ids"] for piece in pieces.get(token, [token])] == long
    assert after.chat_template == before.chat_template


# --- in a recipe ------------------------------------------------------------------------------------------------------


def extended(base: Path, **tokenizer: Any) -> Recipe:
    raw = recipe(save_tokenizer(base / "given") if not (base / "given").is_dir() else base / "given")
    values = raw.model_dump(exclude_unset=True)
    values["tokenizer"] |= tokenizer
    return type(raw).model_validate(values)


def test_the_recipe_s_texts_are_learned_from(tmp_path: Path) -> None:
    base = write_text(tmp_path)
    first = prepare(extended(base, extend={"tokens": 7}, add=["zebra"]), base)
    tokenizer = load_tokenizer(first.tokenizer_path)
    given = load_tokenizer(base / "given")
    learned = extend(given, TokenizerExtension(tokens=7), DOCUMENTS)
    assert tokenizer.get_vocab() == learned.get_vocab() | {"zebra": len(learned)}
    assert read_pieces(first.tokenizer_path) == pieces_of(given, tokenizer)
    assert read_pieces(first.tokenizer_path)[len(learned)] == given("zebra")["input_ids"]
    origin = json.loads((first.tokenizer_path / ORIGIN).read_text())
    assert sorted(origin) == ["contents", "fingerprint", "pieces"]


def test_an_added_word_is_found_where_transformers_finds_it(tmp_path: Path) -> None:
    """A tokenizer that ignores case finds it in any case."""
    base = write_text(tmp_path)
    train_tokenizer(TokenizerTraining(vocab_size=300, lowercase=True), DOCUMENTS).save_pretrained(base / "given")
    tokenizer = load_tokenizer(prepare(extended(base, add=["Zebra"]), base).tokenizer_path)
    expected = load_tokenizer(base / "given")
    expected.add_tokens(["Zebra"])
    for text in ("Zebra", "a zebra.", "ZEBRAS"):
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
        assert len(expected) - 1 in tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("word", "message"),
    [("你好", r"'你好' is already a token, 'ä½łå¥½' in its vocabulary"), ("a", "'a' is already a token")],
)
def test_a_word_that_is_one_token_is_not_added(tmp_path: Path, word: str, message: str) -> None:
    """A byte-level vocabulary spells the bytes of a word."""
    base = write_text(tmp_path)
    train_tokenizer(TokenizerTraining(vocab_size=300), ["你好\n"] * 9).save_pretrained(base / "given")
    assert len(load_tokenizer(base / "given")("你好")["input_ids"]) == 1
    with pytest.raises(RecipeError, match=rf"^tokenizer\.add: {message}. Remove it"):
        prepare(extended(base, add=["zebra", word]), base)
    assert "女" in load_tokenizer(prepare(extended(base, add=["女"]), base).tokenizer_path).get_vocab()


def test_the_pieces_of_a_tokenizer_that_was_extended_before_are_kept(tmp_path: Path) -> None:
    """Otherwise the embeddings of its tokens would start at random in a network that has none for them."""
    base = write_text(tmp_path)
    first = prepare(extended(base, extend={"tokens": 7}), base).tokenizer_path
    values = extended(base).model_dump(exclude_unset=True) | {"tokenizer": {"path": str(first), "add": ["zebra"]}}
    second = prepare(recipe_class().model_validate(values), base).tokenizer_path
    assert len(read_pieces(first)) == 7
    assert read_pieces(second) == read_pieces(first) | {307: load_tokenizer(first)("zebra")["input_ids"]}


def test_its_fingerprint_follows_texts_and_settings(tmp_path: Path) -> None:
    base = write_text(tmp_path)
    prints = {"first": prepare(extended(base, extend={"tokens": 7}), base).fingerprint}
    assert prepare(extended(base, extend={"tokens": 7}), base).fingerprint == prints["first"]
    prints["more"] = prepare(extended(base, extend={"tokens": 8}), base).fingerprint
    prints["rare"] = prepare(extended(base, extend={"tokens": 7, "min_frequency": 3}), base).fingerprint
    prints["without"] = prepare(extended(base), base).fingerprint
    (base / "text.txt").write_text("\n".join([*DOCUMENTS, *NEW]))
    prints["texts"] = prepare(extended(base, extend={"tokens": 7}), base).fingerprint
    assert len(set(prints.values())) == len(prints)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"train": {"vocab_size": 300}, "extend": {"tokens": 3}}, "extend has no effect here: it needs tokenizer.path"),
        ({"path": "x", "add": ["a", "b", "a"]}, "add: 'a' is listed twice"),
        ({"path": "x", "add": ["a"], "init_added": "mean"}, "init_added: has no effect here: it needs model.path"),
    ],
)
def test_settings_without_effect(tokenizer: dict[str, Any], message: str) -> None:
    raw = recipe("x").model_dump(exclude_unset=True)
    with pytest.raises(ValidationError, match=message):
        recipe_class().model_validate(raw | {"tokenizer": tokenizer})
