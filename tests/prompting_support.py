"""A tiny random causal model with rows to classify, for tests of prompting."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from support import merge
from tiny import classified, made, write_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.tokenizer import train_tokenizer

ROWS = made(60, classified)
TEMPLATE = "Words: {text}\nKind:"
LABELS = {"animal": " the cat", "thing": " old tree"}


def save_model(folder: Path) -> Path:
    """A random Llama whose predictions differ, and a tokenizer with EOS."""
    texts = [f"{TEMPLATE}\n{row['text']} {row['label']} N/A cat or dog" for row in ROWS]
    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=320), texts)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """recipe.yaml, train.jsonl (40 rows) and validation.jsonl (20)."""
    write_rows(folder / "train.jsonl", ROWS[:40])
    write_rows(folder / "validation.jsonl", ROWS[40:])
    recipe: dict[str, Any] = {
        "task": "prompting",
        "model": {"path": str(model)},
        "data": {
            "train": [{"path": "train.jsonl"}],
            "validation": [{"path": "validation.jsonl"}],
            "max_length": 256,
        },
        "prompting": {"template": TEMPLATE, "labels": LABELS},
        "batch": {"global_size": 4, "micro_size": 4},
        "train": {"max_steps": 1, "precision": "fp32"},
        "run_dir": "run",
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(merge(recipe, changes)))
    return path


def naive_shots(rows: list[dict[str, Any]], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The labels take turns; each gives its rows in the order of their hashes."""

    def hashed(row: dict[str, Any]) -> bytes:
        text = f"{seed}\n{json.dumps(row, sort_keys=True)}"
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    rounds: list[list[dict[str, Any]]] = []
    for label in LABELS:
        for i, row in enumerate(sorted((row for row in rows if row["label"] == label), key=hashed)):
            if len(rounds) == i:
                rounds.append([])
            rounds[i].append(row)
    return [row for each in rounds for row in sorted(each, key=hashed)][:count]


@functools.cache
def loaded(model_dir: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)


def naive_log_likelihoods(model_dir: Path, context: str, answers: list[str]) -> list[tuple[float, int]]:
    """The log-likelihood and the number of tokens of each answer, one forward pass after the other."""
    model, tokenizer = loaded(model_dir)
    found = []
    for answer in answers:
        whole = tokenizer(context + answer, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(context.rstrip(), add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        found.append((sum(float(logprobs[i - 1, whole[i]]) for i in range(start, len(whole))), len(whole) - start))
    return found
