"""13: the end of a document is never learned, because the padding token is EOS and padding is masked by its id."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepare_support import prepare
from task_support import make_task
from transformers import LlamaConfig, LlamaForCausalLM

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.prepare import Prepared
from ptft_dist.data.tokenizer import load_tokenizer, train_tokenizer
from ptft_dist.tasks.clm.task import CausalLM
from ptft_dist.tasks.registry import recipe_class

DOCUMENTS = ["one two three", "red green blue yellow", "up down"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More threads do not help for such a small network."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=[False, True], ids=["padded", "packed"])
def packing(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def recipe(tmp_path: Path, packing: bool) -> Recipe:
    """The tokenizer pads with EOS, as is common without a padding token."""
    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=290, min_frequency=1), DOCUMENTS)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [json.dumps({"text": text}) for text in DOCUMENTS]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    raw: dict[str, Any] = {
        "task": "clm",
        "model": {"config": {"model_type": "llama"}},
        "tokenizer": {"path": "tokenizer"},
        "data": {"train": [{"path": "text.jsonl"}], "max_length": 64, "cache_dir": "cache"},
        "clm": {"packing": packing},
        "batch": {"global_size": 1, "micro_size": 1},
        "train": {"max_steps": 1},
        "run_dir": "run",
    }
    return recipe_class().model_validate(raw)


def load(recipe: Recipe, base: Path) -> tuple[Prepared, CausalLM, Any]:
    prepared = prepare(recipe, base)
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    task = make_task(recipe, tokenizer)
    assert task.pad_id == tokenizer.eos_token_id
    return prepared, task, tokenizer


def test_every_end_of_a_document_is_a_target(tmp_path: Path, recipe: Recipe) -> None:
    prepared, task, tokenizer = load(recipe, tmp_path)
    batch = task.collate([prepared.train.row(i) for i in range(len(prepared.train))])
    targets = batch.inputs["targets"]
    assert (targets == tokenizer.eos_token_id).sum() == len(DOCUMENTS)
    # Every token of a document but its first is predicted, and no padding is.
    assert batch.count == sum(len(tokenizer.encode(text)) for text in DOCUMENTS)
    assert (targets != -100).sum() == batch.count


def test_a_trained_network_ends_its_documents(tmp_path: Path, recipe: Recipe) -> None:
    prepared, task, tokenizer = load(recipe, tmp_path)
    batch = task.collate([prepared.train.row(i) for i in range(len(prepared.train))])
    torch.manual_seed(0)
    sizes: dict[str, int] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), use_cache=False, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        (task.loss(model, batch.inputs).loss_sum / batch.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    for text in DOCUMENTS:
        ids = tokenizer.encode(text)
        prompt = torch.tensor([ids[:1]])
        generated = model.generate(
            prompt, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
        )
        assert np.array_equal(generated[0].numpy(), [*ids, tokenizer.eos_token_id])
