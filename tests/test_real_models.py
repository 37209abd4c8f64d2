"""Pretrained networks on real data, where PTFT_TEST_MODELS and PTFT_TEST_DATA name folders that hold them.

What comes out is compared with transformers' own forward pass, generation and predictions.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support import eval_rows, start, train_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

MODELS, DATA = Path(os.environ.get("PTFT_TEST_MODELS", "")), Path(os.environ.get("PTFT_TEST_DATA", ""))
SMOLLM, MINILM = MODELS / "smollm2-135m-instruct", MODELS / "minilm-l6"
DOLLY, SST2 = DATA / "sft/dolly_en_151.jsonl", DATA / "cls/sst2"


def needs(model: Path, data: Path) -> Any:
    return pytest.mark.skipif(
        not ("PTFT_TEST_MODELS" in os.environ and model.is_dir() and data.exists()),
        reason=f"PTFT_TEST_MODELS and PTFT_TEST_DATA name no folders with {model.name} and {data.name}",
    )


def train(folder: Path, recipe: dict[str, Any]) -> Path:
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run = start("train", "recipe.yaml", cwd=folder, cache=folder / "cache")
    assert run.wait(timeout_s=400) == 0, run.stderr
    return folder / "run"


@needs(SMOLLM, DOLLY)
def test_smollm2_is_evaluated_fine_tuned_and_writes(tmp_path: Path) -> None:
    answered = [json.loads(line) for line in DOLLY.read_text().splitlines()]
    short = [row for row in answered if not row["context"] and len(row["instruction"] + row["response"]) < 160][:6]
    conversations = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["response"]}]
        for row in short
    ]
    assert len(conversations) == 6
    for name, part in (("train", conversations[:3]), ("validation", conversations[3:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"messages": each}) + "\n" for each in part))
    run_dir = train(
        tmp_path,
        {
            "task": "sft",
            "model": {"path": str(SMOLLM)},
            "tokenizer": {"path": str(SMOLLM)},
            "data": {
                "train": [{"path": "train.jsonl"}],
                "validation": [{"path": "validation.jsonl"}],
                "max_length": 128,
            },
            "batch": {"global_size": 3, "micro_size": 3},
            "optim": {"name": "sgd", "lr": 0.05, "schedule": "constant", "warmup": 0},
            "train": {"max_steps": 2, "precision": "fp32"},
            "eval": {"every": 2, "at_start": True},
            "save": {"every": None},
            "run_dir": "run",
        },
    )
    before, after = eval_rows(run_dir)

    tokenizer, model = AutoTokenizer.from_pretrained(SMOLLM), AutoModelForCausalLM.from_pretrained(SMOLLM).float()
    loss_sum, count = 0.0, 0
    with torch.no_grad():
        for messages in conversations[3:]:
            said = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            ids, learned = torch.tensor([said["input_ids"]]), torch.tensor([said["assistant_masks"]])
            labels = ids.where(learned == 1, -100)
            answer = int((labels[:, 1:] != -100).sum())
            loss_sum, count = loss_sum + model(ids, labels=labels).loss.item() * answer, count + answer
    assert before["eval/loss"] == pytest.approx(loss_sum / count, rel=1e-5)
    assert before["eval/perplexity"] == pytest.approx(math.exp(loss_sum / count), rel=1e-4)
    assert before["eval/perplexity"] < 100  # it is pretrained: one of 49,152 tokens at random would be 49,152
    assert after["eval/loss"] != before["eval/loss"]
    first, second = (row["loss"] for row in train_rows(run_dir))
    assert second < first  # the same three rows

    question = "Name a color of the sky."
    arguments = ("--prompt", question, "--max-new-tokens", "6", "--temperature", "0")
    wrote = start("generate", str(run_dir), *arguments, cwd=tmp_path, cache=tmp_path / "cache")
    assert wrote.wait() == 0, wrote.stderr
    tuned = AutoModelForCausalLM.from_pretrained(run_dir / "model").float()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        theirs = tuned.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert wrote.stdout.strip() == tokenizer.decode(theirs, skip_special_tokens=True).strip() != ""


@needs(MINILM, SST2)
def test_minilm_learns_to_classify(tmp_path: Path) -> None:
    run_dir = train(
        tmp_path,
        {
            "task": "classification",
            "model": {"path": str(MINILM)},
            "tokenizer": {"path": str(MINILM)},
            "data": {
                "train": [{"path": str(SST2 / "train.tsv"), "limit": 240}],
                "validation": [{"path": str(SST2 / "dev.tsv"), "limit": 100}],
                "max_length": 48,
            },
            "batch": {"global_size": 12, "micro_size": 12},
            "optim": {"lr": 3e-4, "schedule": "linear", "warmup": 3},
            "train": {"epochs": 1, "precision": "fp32"},
            "eval": {"every": 20},
            "save": {"every": None},
            "run_dir": "run",
        },
    )
    rows = [line.split("\t") for line in (SST2 / "dev.tsv").read_text().splitlines()[1:101]]
    gold = [label for label, _ in rows]
    majority = max(gold.count(label) for label in set(gold)) / len(gold)
    (scored,) = eval_rows(run_dir)
    assert scored["eval/accuracy"] > majority + 0.1

    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    right = 0
    with torch.no_grad():
        for label, text in rows:
            logits = model(**tokenizer(text, truncation=True, max_length=48, return_tensors="pt")).logits
            right += model.config.id2label[int(logits.argmax())] == label
    assert scored["eval/accuracy"] == pytest.approx(right / len(rows))
