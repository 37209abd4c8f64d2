"""Learning a tokenizer, and encoding with one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prepare_support import DOCUMENTS, save_tokenizer

from ptft_dist.config.recipe import TokenizerTraining
from ptft_dist.data.formats import Document
from ptft_dist.data.tokenizer import DocumentEncoder, load_tokenizer, train_tokenizer
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
    assert [ids[:-1] for ids in encoder.encode([Document(text, "") for text in texts])] == expected


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
    assert "5000 tokens were asked for" in caplog.text
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
