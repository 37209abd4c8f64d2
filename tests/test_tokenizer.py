"""Training tokenizers, and encoding with them."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from prepare_support import DOCUMENTS, save_tokenizer
from pydantic import ValidationError

from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.formats import Document
from ptft_dist.data.tokenizer import (
    DocumentEncoder,
    added_around,
    adds_bos,
    first_megabytes,
    learnable,
    load_tokenizer,
    train_tokenizer,
)
from ptft_dist.data.tokenizer_learning import learn
from ptft_dist.errors import RecipeError
from ptft_dist.judging.perplexity import count_bytes


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_ids_are_those_of_transformers(tokenizer_dir: Path) -> None:
    """Our encoder calls the Rust tokenizer directly; the library's own way is slower and must agree."""
    texts = [*DOCUMENTS, "  two  spaces\n\n\ttab", "你好 🙂", "x" * 5000]
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.backend_tokenizer.enable_truncation(3)  # as a saved tokenizer may have it
    encoder = DocumentEncoder(tokenizer, (None, "eos"))
    expected = load_tokenizer(tokenizer_dir)(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [ids[:-1].tolist() for ids in encoder.encode([Document(text, "") for text in texts])] == expected


def test_a_trained_tokenizer_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    settings = TokenizerTraining(vocab_size=320)
    code = (
        "import sys; from ptft_dist.data.tokenizer import *;"
        "from ptft_dist.config.tokenizer_section import TokenizerTraining;"
        f"train_tokenizer(TokenizerTraining(vocab_size=320), {DOCUMENTS!r}).save_pretrained(sys.argv[1])"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "other")], check=True, env=os.environ | {"PYTHONHASHSEED": "7"}
    )
    train_tokenizer(settings, DOCUMENTS).save_pretrained(tmp_path / "here")
    assert (tmp_path / "here/tokenizer.json").read_bytes() == (tmp_path / "other/tokenizer.json").read_bytes()


def test_the_trained_tokenizer(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=290), DOCUMENTS)
    assert len(tokenizer) == 290
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|bos|>", "<|pad|>")
    assert len({tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}) == 3
    for text in ("ünïcödé 你好 🙂\x00\r\n", "  spaces  ", " x", "it's"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert not caplog.records

    assert len(train_tokenizer(TokenizerTraining(vocab_size=5000), DOCUMENTS)) < 5000
    assert "5000 tokens were requested" in caplog.text
    with pytest.raises(RecipeError, match=r"258 is too small.*259"):
        train_tokenizer(TokenizerTraining(vocab_size=258), DOCUMENTS)


def test_max_megabytes_takes_the_first_documents() -> None:
    taken = []

    def texts() -> Any:
        for text in ("a" * 600, "b" * 600, "c" * 600):
            taken.append(text[0])
            yield text

    train_tokenizer(TokenizerTraining(vocab_size=260, max_megabytes=0.001), texts())
    assert taken == ["a", "b"]


# --- the same bytes on every machine ----------------------------------------------------------------------------------

LEARN = """
import hashlib
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.tokenizer_learning import learn
words = "abcd bcda cdab dabc abdc bdca efgh fghe ghef".split()
texts = [f"{word} {word[::-1]} the {word}s, 我们{word}" for word in words]
for algorithm in ("bpe", "wordpiece", "unigram"):
    settings = TokenizerTraining(algorithm=algorithm)
    settings = settings.model_copy(update={"vocab_size": 290 if algorithm == "bpe" else 60})
    backend = learn(settings, texts * 5, {"unk": "[UNK]"}, ["<x>"])
    print(hashlib.sha256(backend.to_str().encode()).hexdigest(), backend.get_vocab_size())
"""


def test_ten_processes_with_other_seeds_and_threads_learn_the_same_bytes() -> None:
    """The words have many ties. The library's wordpiece and unigram trainers learn ten vocabularies from them."""
    found = set()
    for run in range(10):
        env = os.environ | {"PYTHONHASHSEED": str(run), "RAYON_NUM_THREADS": str(1 + run % 4)}
        found.add(subprocess.run([sys.executable, "-c", LEARN], env=env, check=True, capture_output=True).stdout)
    assert len(found) == 1


def small(algorithm: str, vocab_size: int) -> TokenizerTraining:
    """Settings of a smaller vocabulary than recipes may have."""
    return TokenizerTraining(algorithm=algorithm).model_copy(update={"vocab_size": vocab_size})  # type: ignore[arg-type]


def naive_wordpiece(words: Counter[str], special: list[str], size: int, least: int) -> dict[str, int]:
    """BPE that counts all pairs again before each merge; of equal pairs, the one with the smaller ids."""
    inner = sorted({f"##{letter}" for word in words for letter in word[1:]})
    vocabulary = [*special, *sorted({letter for word in words for letter in word}), *inner]
    split = {word: [word[0], *(f"##{letter}" for letter in word[1:])] for word in words}
    while len(vocabulary) < size:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, parts in split.items():
            ids = [vocabulary.index(part) for part in parts]
            for pair in pairwise(ids):
                pairs[pair] += words[word]
        (a, b), count = min(pairs.items(), key=lambda each: (-each[1], each[0]))
        if count < least:
            break
        new = vocabulary[a] + vocabulary[b].removeprefix("##")
        vocabulary.append(new)
        for parts in split.values():
            for i in range(len(parts) - 1, 0, -1):
                if parts[i - 1 : i + 1] == [vocabulary[a], vocabulary[b]]:
                    parts[i - 1 : i + 1] = [new]
    return {token: i for i, token in enumerate(vocabulary)}


def test_wordpiece_merges_as_a_naive_loop() -> None:
    texts = [text.replace("oo", "o") for text in DOCUMENTS]  # no overlapping pairs, which merge from the left
    words = Counter(word for text in texts for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text))
    learned = learn(small("wordpiece", 120), texts, {"unk": "[UNK]"}, [])
    assert learned.get_vocab() == naive_wordpiece(words, ["[UNK]"], 120, 2)


@pytest.mark.parametrize(("size", "known"), [(1500, 990), (2250, 1129), (2500, 1200)])
def test_letters_that_are_not_kept_are_unknown(size: int, known: int) -> None:
    """1,000 letters or half of the vocabulary, and the most frequent ones; of equal ones, the first in Unicode. More,
    as far as words leave room: here all Latin ones need 1,120 tokens."""
    letters = [chr(0x4E00 + i) for i in range(1200)]
    latin = ["".join(each) for each in itertools.product("abcdefghij", repeat=3)]
    texts = ["".join(letters[:600]) * 2, " ".join(letters[600:]), " ".join(latin * 3)]
    learned = learn(TokenizerTraining(algorithm="wordpiece", vocab_size=size), texts, {"unk": "[UNK]"}, [])
    assert [each for each in letters if learned.encode(each).tokens != ["[UNK]"]] == letters[:known]
    assert len(learned.get_vocab()) == size or known == len(letters)


def test_unigram_pieces_are_those_of_sentencepiece_on_all_words(tmp_path: Path) -> None:
    """It gets counted words here, but every occurrence there."""
    file = tmp_path / "text.txt"
    texts = [" ".join(text.split()) for text in DOCUMENTS]  # sentencepiece itself removes repeated spaces
    file.write_text("\n".join(word for text in texts for word in text.split()))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        input=str(file), model_writer=model, vocab_size=81, hard_vocab_limit=False, character_coverage=1.0,
        bos_id=-1, eos_id=-1, unk_id=0, num_threads=4, minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    learned = learn(small("unigram", 81), texts, {"unk": "<unk>"}, [])
    scores = dict(json.loads(learned.to_str())["model"]["vocab"])
    assert scores.pop("<unk>") < min(scores.values())
    assert scores == {theirs.id_to_piece(i): theirs.get_score(i) for i in range(1, theirs.vocab_size())}
    for text in (*texts[:20], "wizards over foxes", "silence"):
        assert learned.encode(text).tokens == theirs.encode(text, out_type=str)


@pytest.mark.parametrize("algorithm", ["wordpiece", "unigram"])
def test_a_vocabulary_is_never_larger_than_wanted(algorithm: str) -> None:
    texts = ["".join(chr(0x4E00 + i) for i in range(900)), *DOCUMENTS]
    tokenizer = train_tokenizer(TokenizerTraining(algorithm=algorithm, vocab_size=400), texts)  # type: ignore[arg-type]
    assert len(tokenizer) <= 400


def test_control_characters_are_no_words_of_the_table() -> None:
    """Tabs and line ends separate the columns and rows of the table that sentencepiece reads."""
    texts = ["one\ttwo\nthree\r\nfour ▅ five\x00six"] * 20
    tokenizer = train_tokenizer(TokenizerTraining(algorithm="unigram", vocab_size=300), texts)
    ids = tokenizer(texts[0], add_special_tokens=False)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == texts[0]


# --- choices ----------------------------------------------------------------------------------------------------------


def trained(texts: list[str], **settings: Any) -> Any:
    return train_tokenizer(TokenizerTraining.model_validate(settings), texts * 30, ("eos", "pad"))


def pieces(tokenizer: Any, text: str) -> list[str]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.decode([i]) for i in ids]


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
@pytest.mark.parametrize(
    ("choice", "text", "same"), [("lowercase", "HELLO Wörld", "hello wörld"), ("strip_accents", "wörld", "world")]
)
def test_normalization_of_every_algorithm(algorithm: str, choice: str, text: str, same: str) -> None:
    texts = ["hello wörld HELLO world W"]
    plain, changed = (trained(texts, algorithm=algorithm, vocab_size=300, **each) for each in ({}, {choice: True}))
    assert plain(text)["input_ids"] != plain(same)["input_ids"]
    assert changed(text)["input_ids"] == changed(same)["input_ids"]


@pytest.mark.parametrize("normalizer", ["none", "nfc", "nfkc"])
@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_unicode_normal_forms(algorithm: str, normalizer: str) -> None:
    texts = [f"{text} fine" for text in ("ﬁne", "e\u0301")]
    tokenizer = trained(texts, algorithm=algorithm, vocab_size=300, normalizer=normalizer)
    wanted = {"none": str, "nfc": partial(unicodedata.normalize, "NFC"), "nfkc": partial(unicodedata.normalize, "NFKC")}
    for text in texts:
        normal = wanted[normalizer](text)
        assert tokenizer(text)["input_ids"] == tokenizer(normal)["input_ids"]
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == normal


def test_words_of_llama_3() -> None:
    texts = ["in 1234567 ways (DON'T)\n\n\nnow"]
    assert " 1234567" in pieces(trained(texts, vocab_size=330), texts[0])
    assert pieces(trained(texts, vocab_size=330, pre_tokenizer="llama3"), texts[0]) == [
        "in", " ", "123", "456", "7", " ways", " (", "DON", "'T", ")\n\n\n", "now",
    ]  # fmt: skip


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_each_digit_alone(algorithm: str) -> None:
    texts = ["x 2024 y", "in 2024 and 2024s", "2024er"]  # pieces come from at least two words
    together = trained(texts, algorithm=algorithm, vocab_size=300)
    alone = trained(texts, algorithm=algorithm, vocab_size=300, split_digits=True)
    assert "2024" in [piece.strip() for piece in pieces(together, texts[0])]
    assert [piece for piece in pieces(alone, texts[0]) if piece.strip().isdigit()] == ["2", "0", "2", "4"]


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_each_chinese_character_alone(algorithm: str) -> None:
    texts = ["北京 北京 cat"]
    assert "北京" in pieces(trained(texts, algorithm=algorithm, vocab_size=300), texts[0])
    alone = pieces(trained(texts, algorithm=algorithm, vocab_size=300, split_cjk=True), texts[0])
    assert [piece for piece in alone if piece.strip() in tuple("北京")] == ["北", "京"] * 2
    assert "cat" in [piece.strip() for piece in alone]


def test_unigram_words_end_at_punctuation() -> None:
    texts = ["end.of, end.of,"]
    settings = {"algorithm": "unigram", "vocab_size": 300, "pre_tokenizer": "words"}
    assert pieces(trained(texts, **settings), "end.of,") == ["end", ".", "of", ","]


def test_bytes_of_unknown_characters() -> None:
    settings = {"algorithm": "unigram", "vocab_size": 300}
    texts = ["a cat", "<0x0A> 0A x <"]
    plain, fallback = trained(texts, **settings), trained(texts, byte_fallback=True, **settings)
    text = "a cat 🙂 <0x0A>"
    assert plain.unk_token_id in plain(text)["input_ids"]
    ids = fallback(text, add_special_tokens=False)["input_ids"]
    assert fallback.unk_token_id not in ids
    assert fallback.decode(ids) == text
    assert fallback.convert_tokens_to_ids("<0x0A>") not in ids  # it is written out, and no line end


@pytest.mark.parametrize("settings", [{"algorithm": "bpe"}, {"algorithm": "unigram", "byte_fallback": True}])
def test_bytes_of_tokens_that_begin_or_end_inside_a_character(settings: dict[str, Any]) -> None:
    tokenizer = trained(["a cat sat"], vocab_size=300, special_tokens=["<|im_start|>"], **settings)
    tokenizer.add_tokens(["猫猫"])
    text = "a cat 北京 \ufffd 🙂 猫猫 sat"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")

    assert count_bytes(tokenizer, ids) == count_bytes(tokenizer, [special, *ids]) == len(text.encode())
    # Decoders may remove the space of a first token, so a row is decoded with the token before it.
    for i, j in itertools.combinations(range(1, len(ids)), 2):
        rows = ([special, *ids[:i]], ids[i:j], [*ids[j:], special])
        befores = ([], ids[i - 1 : i], ids[j - 1 : j])
        sizes = [
            count_bytes(tokenizer, [*before, *row]) - count_bytes(tokenizer, before)
            for before, row in zip(befores, rows, strict=True)
        ]
        assert sum(sizes) == len(text.encode())


def test_special_tokens_of_the_recipe() -> None:
    tokenizer = trained(["a cat"], vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"])
    ids = tokenizer("<|im_start|>a cat<|im_end|>")["input_ids"]
    assert [ids[0], ids[-1]] == tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert "<|im_end|>" in tokenizer.all_special_tokens
    with pytest.raises(RecipeError, match=r"special_tokens: '<\|pad\|>' is a special token already"):
        trained(["a cat"], vocab_size=300, special_tokens=["<|pad|>"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pre_tokenizer": "words"}, "pre_tokenizer: words does not fit algorithm: bpe. Use gpt2 or llama3"),
        ({"algorithm": "unigram", "pre_tokenizer": "gpt2"}, "pre_tokenizer: gpt2 does not fit algorithm: unigram"),
        ({"algorithm": "wordpiece", "normalizer": "nfkc"}, "normalizer: nfkc does not fit algorithm: wordpiece"),
        ({"normalizer": "bert"}, "normalizer: bert does not fit algorithm: bpe. Use none or nfc or nfkc"),
        ({"algorithm": "unigram", "min_frequency": 3}, "min_frequency has no effect here"),
        ({"byte_fallback": True}, "byte_fallback has no effect here"),
        ({"algorithm": "wordpiece", "split_cjk": True}, "split_cjk has no effect here"),
    ],
)
def test_choices_without_effect(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        TokenizerTraining.model_validate(settings)


# --- long words -------------------------------------------------------------------------------------------------------


def test_texts_without_a_giant_word_are_learned_from_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    for text in ("", "a b", "x" * 2000, f"{'x' * 2000} {'y' * 2000}\n\n", "我" * 2000, " " * 2000):
        assert list(learnable([(text, "a.txt:1")])) == [text]
    assert not caplog.records


def test_giant_words_are_learned_from_in_pieces(caplog: pytest.LogCaptureFixture) -> None:
    text = f"before {'x' * 4500} between {' ' * 2001}{'y' * 4000}"
    pieces = list(learnable([(text, "a.txt:7")]))
    assert "".join(pieces) == text
    assert [len(word) for piece in pieces for word in piece.split()] == [6, 2000, 2000, 500, 7, 2000, 2000]
    assert "a.txt:7: the text has a word" in caplog.text


def test_many_texts_without_spaces_give_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    """As Chinese has them."""
    texts = [("我" * 3000, f"a.jsonl:{i}") for i in range(1, 101)]
    assert "".join(first_megabytes(learnable([("我", "a.jsonl:0"), *texts]), 0.3)) == "我" * 101_001
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == ["a.jsonl:1 and 33 more texts"]


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_a_megabyte_of_one_character_is_learned_from_in_seconds(algorithm: str) -> None:
    """Learned from whole, 80,000 characters took 7 s, and the time grows with the square."""
    texts = [piece for text in ("a" * 1_000_000, *DOCUMENTS) for piece in learnable([(text, "a.txt:1")])]
    started = time.process_time()
    train_tokenizer(TokenizerTraining(vocab_size=300, algorithm=algorithm), texts)  # type: ignore[arg-type]
    assert time.process_time() - started < 20


# --- what a tokenizer adds itself -------------------------------------------------------------------------------------


def with_template(template: str | None, *roles: str) -> Any:
    """A tokenizer that encodes a text as the template says, such as "<|bos|> $A"."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=300), DOCUMENTS, roles)
    tokenizer.backend_tokenizer.post_processor = None
    if template is not None:
        special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in tokenizer.all_special_tokens]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


def test_what_a_tokenizer_adds() -> None:
    plain = with_template(None, "eos", "bos")
    assert added_around(plain) == ([], [])
    assert not adds_bos(plain)
    llama = with_template("<|bos|> $A", "eos", "bos")
    assert added_around(llama) == ([llama.bos_token_id], [])
    assert adds_bos(llama)
    bert = with_template("<|cls|> $A <|sep|>", "eos", "bos", "cls", "sep")
    assert added_around(bert) == ([bert.cls_token_id], [bert.sep_token_id])
    assert not adds_bos(bert)


def test_documents_that_begin_or_end_otherwise_than_the_tokenizer_s_texts() -> None:
    llama = with_template("<|bos|> $A", "eos", "bos")
    assert DocumentEncoder(llama, ("bos", "eos")).disagreement() is None
    assert "`text <|endoftext|>`" in str(DocumentEncoder(llama, (None, "eos")).disagreement())
    assert "`<|bos|> text`" in str(DocumentEncoder(llama, (None, "eos")).disagreement())
    plain = with_template(None, "eos", "bos", "cls", "sep")
    assert DocumentEncoder(plain, (None, "eos")).disagreement() is None
    assert DocumentEncoder(plain, ("cls", "sep")).disagreement() is not None
    bert = with_template("<|cls|> $A <|sep|>", "eos", "cls", "sep")
    assert DocumentEncoder(bert, ("cls", "sep")).disagreement() is None
    assert DocumentEncoder(bert, (None, "eos")).disagreement() is not None
