"""gigatoken gives the tokens of `tokenizers`, or is not used."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare_support import DOCUMENTS, save_tokenizer
from tokenizers import Tokenizer

from ptft_dist.data import fast_bpe
from ptft_dist.data.fast_bpe import FastBpe, TextTokens, Tokens
from ptft_dist.data.tokenizer import load_tokenizer, text_only_backend
from ptft_dist.errors import PtftError

pytest.importorskip("gigatoken")

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PARTS = [
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t",
    "'s",
    "'LL",
    "’s",
    "ſ",
    "'ſ",
    "K",
    "a",
    "Zeta",
    "_",
    "-",
    "1",
    "23",
    "٣",
    "½",
    "ª",
]
PARTS += [
    "é",
    "e\u0301",
    "中",
    "文",
    "\u3000",
    "\xa0",
    "\u200b",
    "\x00",
    "😀",
    "👩\u200d👩",
    "\u2028",
    "\u088f",
    "<|pad|>",
]
"""U+088F is a letter since Unicode 17, which the two libraries know or do not."""


def split(numbers: str) -> dict[str, Any]:
    pattern = {"Regex": CONTRACTIONS + REST % numbers}
    first = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [first, BYTES | {"use_regex": False}]}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The contents of a tokenizer.json with the special tokens <|endoftext|>, <|bos|> and <|pad|>."""
    tokenizer = load_tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    return json.loads(text_only_backend(tokenizer).to_str())


def backend(state: dict[str, Any], *, special: bool = False, **changes: Any) -> Tokenizer:
    made = Tokenizer.from_str(json.dumps(state | changes))
    made.encode_special_tokens = not special
    return made


def texts(count: int = 400) -> list[str]:
    chance = random.Random(0)
    return [*DOCUMENTS, "", *("".join(chance.choices(PARTS, k=chance.randint(1, 30))) for _ in range(count))]


def expected(backend: Tokenizer, texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
    encoded = [backend.encode(text, add_special_tokens=False) for text in texts]
    return [(each.ids, each.offsets) for each in encoded]


def plain(tokens: list[Tokens]) -> list[tuple[list[int], list[tuple[int, ...]]]]:
    return [
        (each.ids.tolist(), [tuple(o) for o in each.offsets.tolist()]) for each in tokens if each.offsets is not None
    ]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("pre_tokenizer", [BYTES, split("{1,3}"), split("")], ids=["gpt2", "llama3", "qwen2"])
def test_tokens_and_offsets(state: dict[str, Any], pre_tokenizer: dict[str, Any], special: bool) -> None:
    made = backend(state, special=special, pre_tokenizer=pre_tokenizer)
    assert plain(FastBpe(made, offsets=True).tokens(texts())) == expected(made, texts())


def test_a_byte_that_the_vocabulary_lacks(state: dict[str, Any]) -> None:
    """`tokenizers` leaves the character out, and may merge its neighbours."""
    model = state["model"]
    kept = {token: i for token, i in model["vocab"].items() if "Q" not in token}
    merges = [pair for pair in model["merges"] if "Q" not in "".join(pair)]
    made = backend(state, model=model | {"vocab": kept, "merges": merges})
    asked = ["theQre are", "Q", "no such byte", "QQ th"]
    assert plain(FastBpe(made, offsets=True).tokens(asked)) == expected(made, asked)


def test_added_tokens_that_are_not_special(state: dict[str, Any]) -> None:
    top = max(state["model"]["vocab"].values()) + 1
    token = {"id": top, "content": "<tool>", "special": False, "normalized": False}
    token |= {"single_word": False, "lstrip": False, "rstrip": False}
    made = backend(state, added_tokens=[*state["added_tokens"], token])
    asked = ["a <tool> and", "<tool><tool>", "<tool", *DOCUMENTS]
    assert plain(FastBpe(made, offsets=True).tokens(asked)) == expected(made, asked)


def test_a_character_that_differs_goes_to_tokenizers(state: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, real = FastBpe(backend(state), offsets=False), FastBpe._encode

    def wrong(self: FastBpe, texts: list[str]) -> list[np.ndarray]:
        return [ids[::-1] if "é" in text else ids for text, ids in zip(texts, real(self, texts), strict=True)]

    monkeypatch.setattr(FastBpe, "_encode", wrong)
    asked = ["café au lait", "tea"]
    assert [t.ids.tolist() for t in engine.tokens(asked)] == [ids for ids, _ in expected(backend(state), asked)]


def test_the_cache_is_emptied(state: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_bpe, "_REBUILT_AFTER", 100)
    engine = FastBpe(backend(state), offsets=False)
    first = engine._engine
    got = [tokens.ids.tolist() for text in texts(50) for tokens in engine.tokens([text])]
    assert engine._engine is not first
    assert got == [ids for ids, _ in expected(backend(state), texts(50))]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": BYTES | {"add_prefix_space": True}},
        {"pre_tokenizer": BYTES | {"use_regex": False}},
        {"pre_tokenizer": None},
        {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ],
)
def test_not_suitable(state: dict[str, Any], change: dict[str, Any]) -> None:
    assert fast_bpe._engine(backend(state), offsets=True) is not None
    assert fast_bpe._engine(backend(state, **change), offsets=True) is None


def test_small_data_do_not_load_it(state: dict[str, Any]) -> None:
    tokens = TextTokens(backend(state), offsets=False)
    tokens.of(texts())
    assert tokens._engine is None


def test_the_variable(state: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fast_bpe.VARIABLE, "0")
    assert fast_bpe._engine(backend(state), offsets=False) is None


def test_other_tokens_are_noticed(state: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the first batch it is not used; later it is an error."""
    monkeypatch.setattr(fast_bpe, "LEAST", 0)
    said: list[str] = []
    monkeypatch.setattr(fast_bpe, "say", said.append)
    real = FastBpe._tokens
    good = TextTokens(backend(state), offsets=False)
    good.of(DOCUMENTS)
    assert good._engine is not None
    monkeypatch.setattr(FastBpe, "_tokens", lambda self, text, ids: real(self, text, ids[:-1]))
    with pytest.raises(PtftError, match="PTFT_FAST_TOKENIZER=0"):
        good.of(DOCUMENTS)
    bad = TextTokens(backend(state), offsets=False)
    assert [tokens.ids.tolist() for tokens in bad.of(DOCUMENTS)] == [i for i, _ in expected(backend(state), DOCUMENTS)]
    assert "not used" in said[0]


@pytest.mark.parametrize("task", ["clm", "sft"])
def test_the_same_bytes(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptft_dist.data.prepare import prepare
    from ptft_dist.tasks.common.chat_template import CHATML
    from ptft_dist.tasks.registry import encoder_class, recipe_class

    tokenizer = load_tokenizer(save_tokenizer(tmp_path / "tokenizer"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    clean = [text.replace("<|pad|>", "") or "x" for text in texts()]
    ask = [{"role": "user", "content": "Copy, naïve 中 one!"}]
    rows: list[dict[str, Any]] = [{"text": text} for text in clean]
    if task == "sft":
        rows = [{"messages": [*ask, {"role": "assistant", "content": text}]} for text in clean if text.strip()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(fast_bpe, "LEAST", 0)
    used: list[int] = []
    real = FastBpe.tokens
    monkeypatch.setattr(FastBpe, "tokens", lambda self, texts: used.append(1) or real(self, texts))

    def contents(fast: str) -> dict[str, bytes]:
        monkeypatch.setenv(fast_bpe.VARIABLE, fast)
        recipe = recipe_class().model_validate(
            {
                "task": task,
                "model": {"config": {"model_type": "llama"}},
                "tokenizer": {"path": "tokenizer"},
                "data": {"train": [{"path": "rows.jsonl"}], "validation": 0.2, "max_length": 64, "cache_dir": fast},
                "batch": {"global_size": 1, "micro_size": 1},
                "train": {"max_steps": 1},
                "run_dir": "run",
            }
        )
        prepared = prepare(recipe, tmp_path, encoder_class(task), workers=1)
        assert prepared.validation is not None
        stores = (prepared.train.path, prepared.validation.path)
        return {f"{store.name}/{file.name}": file.read_bytes() for store in stores for file in store.iterdir()}

    slow = contents("0")
    assert not used
    assert contents("1") == slow
    assert used
    assert slow["train/tokens.bin" if task == "clm" else "train/input_ids.bin"]
