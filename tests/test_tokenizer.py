"""Training tokenizers, and encoding with them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from prepare_support import DOCUMENTS, save_tokenizer

from ptft_dist.config.recipe import TokenizerTraining
from ptft_dist.data.formats import Document
from ptft_dist.data.tokenizer import (
    DocumentEncoder,
    added_around,
    adds_bos,
    learnable,
    load_tokenizer,
    train_tokenizer,
)
from ptft_dist.errors import RecipeError


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
        "import sys; from ptft_dist.data.tokenizer import *; from ptft_dist.config.recipe import TokenizerTraining;"
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


# --- long words -------------------------------------------------------------------------------------------------------


def test_texts_without_a_giant_word_are_learned_from_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    for text in ("", "a b", "x" * 2000, f"{'x' * 2000} {'y' * 2000}\n\n", "我" * 2000, " " * 2000):
        assert list(learnable(text, "a.txt:1")) == [text]
    assert not caplog.records


def test_giant_words_are_learned_from_in_pieces(caplog: pytest.LogCaptureFixture) -> None:
    text = f"before {'x' * 4500} between {' ' * 2001}{'y' * 4000}"
    pieces = list(learnable(text, "a.txt:7"))
    assert "".join(pieces) == text
    assert [len(word) for piece in pieces for word in piece.split()] == [6, 2000, 2000, 500, 7, 2000, 2000]
    assert "a.txt:7: the text has a word" in caplog.text


@pytest.mark.parametrize("algorithm", ["bpe", "wordpiece", "unigram"])
def test_a_megabyte_of_one_character_is_learned_from_in_seconds(algorithm: str) -> None:
    """Learned from whole, 80,000 characters took 7 s, and the time grows with the square."""
    texts = [piece for text in ("a" * 1_000_000, *DOCUMENTS) for piece in learnable(text, "a.txt:1")]
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
