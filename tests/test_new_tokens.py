"""Embeddings of added tokens: the mean of those of their pieces, in every kind of training."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from adapt_support import write_adapted, write_base
from prepare_support import save_tokenizer
from support import eval_rows, make_recipe, start, train_rows
from tiny import write_tiny
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from ptft_dist import api
from ptft_dist.networks.new_tokens import NewTokens

SMOLLM = Path(os.environ.get("PTFT_TEST_MODELS", "")) / "smollm2-135m-instruct"
ADDED = ["quick brown", "zebra", "wizards"]


def save_network(folder: Path, *, tied: bool, rows: int = 300) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.5,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def naive_rows(table: torch.Tensor, tokenizer: Any, words: list[str]) -> list[torch.Tensor]:
    rows = []
    for word in words:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        rows.append(sum(table[i].float() for i in ids) / len(ids))
    return rows


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8, 12], ids=["as many rows as tokens", "padded"])
@pytest.mark.parametrize("kind", ["bert", "tied llama", "llama", "t5"])
def test_input_rows_head_rows_and_bias(kind: str, rows: int) -> None:
    """Tokens 6 and 7 are new; other rows stay as they are."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": rows, "hidden_size": 4, "num_attention_heads": 1, "intermediate_size": 4}
    model: Any
    if kind == "bert":
        model = AutoModelForMaskedLM.from_config(BertConfig(**sizes, num_hidden_layers=1))
    elif kind == "t5":
        sizes = {"d_model": 4, "d_kv": 4, "d_ff": 4, "num_layers": 1, "num_heads": 1}
        untied = T5Config(vocab_size=rows, tie_word_embeddings=False, **sizes)
        model = T5ForConditionalGeneration(untied)
    else:
        tied = kind == "tied llama"
        config = LlamaConfig(**sizes, num_hidden_layers=1, num_key_value_heads=1, tie_word_embeddings=tied)
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = NewTokens({6: [1, 3, 3], 7: []}, "pieces")
    new.initialize(new.tables(model))
    changed = set()
    for name, tensor in model.state_dict().items():
        expected = before[name].clone()
        if expected.ndim and expected.shape[0] == rows:
            expected[6] = (expected[1] + 2 * expected[3]) / 3
            expected[7] = before[name][:6].sum(0) / 6  # nothing is known about its pieces
            changed.add(name)
        torch.testing.assert_close(tensor, expected)
    assert len(changed) == {"bert": 4, "tied llama": 2, "llama": 2, "t5": 4}[kind]


def test_a_piece_that_is_new_too_stands_for_its_own_pieces() -> None:
    """As in a tokenizer that was extended twice."""
    table = torch.nn.Embedding(6, 4)
    before = table.weight.detach().clone()
    NewTokens({4: [0, 1], 5: [4, 2]}, "pieces").initialize([table.weight])
    torch.testing.assert_close(table.weight.detach()[4:], torch.stack([before[:2].mean(0), before[:3].mean(0)]))


@pytest.mark.parametrize("start", ["mean", "random"])
def test_other_starts(start: Any) -> None:
    table = torch.nn.Embedding(9, 4)
    before = table.weight.detach().clone()
    NewTokens({7: [1], 8: [2]}, start).initialize([table.weight])
    expected = before.clone()
    if start == "mean":
        expected[7:] = before[:7].sum(0) / 7
    torch.testing.assert_close(table.weight.detach(), expected)


# --- in a run ---------------------------------------------------------------------------------------------------------


def train(folder: Path, cache: Path, recipe: dict[str, Any], *words: str, **how: Any) -> Path:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run = start("train", "recipe.yaml", *words, cwd=folder, cache=cache, **how)
    assert run.wait() == 0, run.stderr
    return folder / "run"


def recipe_on(folder: Path, documents: Path, base: Path, **changes: Any) -> dict[str, Any]:
    recipe = make_recipe(
        documents,
        tokenizer={"path": str(base), "train": None, "add": ADDED},
        optim={"name": "sgd", "lr": 1e-12, "schedule": "constant", "warmup": 0, "weight_decay": 0.0},
        train={"max_steps": 1},
        eval={"every": None},
        save={"every": None},
        **changes,
    )
    recipe["model"] = {"path": str(base)} | changes.get("model", {})
    return recipe | {"run_dir": str(folder / "run")}


@pytest.mark.parametrize(
    ("kind", "ranks", "adapt"),
    [("cpu", 1, "full"), ("cpu_zero3", 2, "full"), ("fsdp2", 2, "full"), ("cpu", 1, "lora"), ("fsdp2", 2, "lora")],
)
@pytest.mark.parametrize("rows", [300, 320], ids=["more rows are needed", "there are rows"])
def test_every_backend_starts_from_the_pieces(
    tmp_path: Path, documents: Path, cache: Path, kind: str, ranks: int, adapt: str, rows: int
) -> None:
    """After one update with a learning rate of almost 0. The head is not tied. peft needs a GPU for single tokens under
    ZeRO-3."""
    base = save_network(tmp_path / "base", tied=False, rows=rows)
    run_dir = train(
        tmp_path, cache, recipe_on(tmp_path, documents, base, model={"adapt": adapt}), ranks=ranks, kind=kind
    )
    before, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if adapt == "lora":
        out = start("merge", str(run_dir / "model"), "--out", str(tmp_path / "merged"), cwd=tmp_path, cache=cache)
        assert out.wait() == 0, out.stderr
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "merged" if adapt == "lora" else run_dir / "model").float()
    ids = AutoTokenizer.from_pretrained(run_dir / "tokenizer").convert_tokens_to_ids(ADDED)
    assert ids == [300, 301, 302]
    for name in ("get_input_embeddings", "get_output_embeddings"):
        old, new = (getattr(model, name)().weight.detach() for model in (before, after))
        torch.testing.assert_close(new[ids], torch.stack(naive_rows(old, tokenizer, ADDED)), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(new[:300], old[:300], atol=1e-5, rtol=1e-5)


def test_trained_rows_stay_when_the_model_is_read_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To evaluate it, and to train it further with the run's tokenizer, which knows the pieces."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    base = write_base(tmp_path / "base", cache, "clm", layers=1)
    recipe: dict[str, Any] = json.loads(write_tiny(tmp_path, "clm", layers=1, eval={"every": None}).read_text())
    recipe["model"], recipe["run_dir"] = {"path": str(base)}, "run"
    recipe["tokenizer"] = {"path": str(base), "add": ["small cat", "old dog", "red house", "blue tree"]}
    recipe["optim"] = {"lr": 0.05, "schedule": "constant", "warmup": 0}
    trained = api.train(recipe, {"train.max_steps": 12}, quiet=True).metrics
    untrained = api.train(recipe, {"optim.lr": 1e-12, "run_dir": "start", "train.max_steps": 1}, quiet=True).metrics
    assert trained["eval/loss"] < untrained["eval/loss"] - 0.1
    assert api.evaluate_model("run").metrics["eval/loss"] == pytest.approx(trained["eval/loss"], rel=1e-6)
    more = {**recipe, "model": {"path": "run/model"}, "tokenizer": {"path": "run/tokenizer"}, "run_dir": "more"}
    again = api.train(more, {"optim.lr": 1e-12, "train.max_steps": 1}, quiet=True).metrics
    assert again["eval/loss"] == pytest.approx(trained["eval/loss"], rel=1e-5)


def test_the_reference_of_dpo_starts_from_the_pieces_too(tmp_path: Path, cache: Path) -> None:
    """Policy and reference are equal at first, so the loss of the first update is log 2."""
    base = write_base(tmp_path, cache, "dpo", layers=1)
    write_adapted(tmp_path, base, "dpo", {}, train={"max_steps": 1})
    recipe = json.loads((tmp_path / "recipe.yaml").read_text())
    recipe["tokenizer"]["add"] = ["small cat"]
    assert AutoTokenizer.from_pretrained(base).convert_tokens_to_ids("small cat") is None
    run_dir = train(tmp_path, cache, recipe)
    assert len(AutoTokenizer.from_pretrained(run_dir / "tokenizer")("small cat")["input_ids"]) == 1
    assert train_rows(run_dir)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_the_reference_of_ppo_has_the_new_tokens(tmp_path: Path, cache: Path) -> None:
    """Policy and reference are equal at first, so the KL divergence of the first rollout is 0."""
    base = write_base(tmp_path, cache, "ppo", layers=1)
    write_adapted(tmp_path, base, "ppo", {}, train={"max_steps": 1}, ppo={"kl": 0.1})
    recipe = json.loads((tmp_path / "recipe.yaml").read_text())
    recipe["tokenizer"]["add"] = ["small cat", "old dog", "green house", "cat runs", "dog sleeps"]
    run_dir = train(tmp_path, cache, recipe)
    assert train_rows(run_dir)[0]["kl"] == pytest.approx(0.0, abs=1e-5)


@pytest.mark.skipif(not SMOLLM.is_dir(), reason="PTFT_TEST_MODELS names no folder with smollm2-135m-instruct")
def test_smollm2_reads_new_tokens_better_than_at_random(tmp_path: Path, cache: Path) -> None:
    """Loss at update 0 on text full of tokens that were learned from it; transformers computes the expected one."""
    words = ["electrocardiogram", "tachycardia", "bradycardia", "myocardial", "infarction", "angiography"]
    texts = [f"The {a} of {b} shows {a}, and no {b}." for a in words for b in words if a != b]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    losses = {}
    for how in ("pieces", "random"):
        folder = tmp_path / how
        folder.mkdir()
        recipe = {
            "task": "clm",
            "model": {"path": str(SMOLLM)},
            "tokenizer": {"path": str(SMOLLM), "extend": {"tokens": 30}, "init_added": how},
            "data": {
                "train": [{"path": str(tmp_path / "text.txt"), "document": "line"}],
                "validation": [{"path": str(tmp_path / "text.txt"), "document": "line", "limit": 4}],
                "max_length": 64,
            },
            "clm": {"packing": False},
            "batch": {"global_size": 1, "micro_size": 1},
            "optim": {"name": "sgd", "lr": 1e-12, "schedule": "constant", "warmup": 0},
            "train": {"max_steps": 1, "precision": "fp32"},
            "eval": {"at_start": True, "micro_size": 4},
            "save": {"every": None},
            "run_dir": "run",
        }
        run_dir = train(folder, cache, recipe)
        losses[how] = eval_rows(run_dir)[0]["eval/loss"]
        shutil.rmtree(run_dir / "model")
    assert losses["pieces"] < losses["random"] - 1, losses

    old, tokenizer = AutoModelForCausalLM.from_pretrained(SMOLLM).float(), AutoTokenizer.from_pretrained(SMOLLM)
    extended = AutoTokenizer.from_pretrained(tmp_path / "pieces/run/tokenizer")
    new = [token for token, i in sorted(extended.get_vocab().items(), key=lambda each: each[1]) if i >= len(tokenizer)]
    text = [tokenizer.backend_tokenizer.decoder.decode([token]) for token in new]
    table = old.get_input_embeddings().weight.detach()
    rows = torch.stack(naive_rows(table, tokenizer, text))
    old.resize_token_embeddings(len(extended), mean_resizing=False)
    with torch.no_grad():
        old.get_input_embeddings().weight[len(tokenizer) :] = rows
        loss_sum, count = 0.0, 0
        for line in texts[:4]:
            ids = torch.tensor([[*extended(line)["input_ids"], extended.eos_token_id]])
            assert (ids >= len(tokenizer)).sum() >= 2
            loss_sum += old(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert losses["pieces"] == pytest.approx(loss_sum / count, rel=1e-4)
