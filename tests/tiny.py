"""A tiny recipe with generated rows for every task, for the tests of P1 and P2. A new task needs an entry in TINY.
Tasks that are evaluated only have none: these tests are about updates and resuming."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import support
from support import evaluated_quickly, merge

WORDS = [
    "red",
    "green",
    "blue",
    "small",
    "large",
    "old",
    "new",
    "cat",
    "dog",
    "house",
    "tree",
    "runs",
    "sleeps",
    "eats",
]

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
XLNET = {"model_type": "xlnet", "d_model": 32, "d_inner": 64, "n_layer": 2, "n_head": 2}


def sentence(chance: random.Random, longest: int = 20) -> list[str]:
    return chance.choices(WORDS, k=chance.randint(2, longest))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def made(count: int, row: Callable[[random.Random], dict[str, Any]]) -> list[dict[str, Any]]:
    chance = random.Random(0)
    return [row(chance) for _ in range(count)]


def classified(chance: random.Random) -> dict[str, Any]:
    words = sentence(chance)
    return {"text": " ".join(words), "label": "animal" if {"cat", "dog"} & set(words) else "thing"}


def talked(chance: random.Random) -> dict[str, Any]:
    turns = [{"role": role, "content": " ".join(sentence(chance, 6))} for role in ("user", "assistant")]
    more = [{"role": role, "content": " ".join(sentence(chance, 4))} for role in ("user", "assistant")]
    return {"messages": turns + more * chance.randint(0, 1)}


def preferred(chance: random.Random) -> dict[str, Any]:
    """An answer with an animal is better than one without; some rows have a margin."""
    prompt = [{"role": "user", "content": " ".join(sentence(chance, 4))}]
    words = sentence(chance, 5)
    chosen, rejected = (
        [{"role": "assistant", "content": " ".join(each)}] for each in ([*words, "cat"], [*words, "house"])
    )
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    return row | ({"margin": chance.random()} if chance.random() < 0.5 else {})


def rated(chance: random.Random) -> dict[str, Any]:
    words = sentence(chance)
    return {"text": " ".join(words), "text_pair": " ".join(sentence(chance)), "label": len(words) / 10}


def rewritten(chance: random.Random) -> dict[str, Any]:
    words = sentence(chance)
    return {"source": " ".join(words), "target": " ".join(sorted(words)[: chance.randint(3, 6)])}


def tagged(chance: random.Random) -> dict[str, Any]:
    """An animal and the word after it are an entity."""
    words = sentence(chance)
    tags = ["O"] * len(words)
    for i, word in enumerate(words):
        if word in ("cat", "dog"):
            tags[i : i + 2] = [f"B-{word.upper()}", f"I-{word.upper()}"][: len(words) - i]
    return {"tokens": words, "tags": tags}


def asked(chance: random.Random) -> dict[str, Any]:
    words = sentence(chance)
    wanted = chance.choice(WORDS)
    context = " ".join(words)
    start = f" {context} ".find(f" {wanted} ")
    answers = {"text": [wanted], "answer_start": [start]} if start >= 0 else {"text": [], "answer_start": []}
    return {"question": f"where is {wanted}?", "context": context, "answers": answers}


def judged(chance: random.Random) -> dict[str, Any]:
    pair = preferred(chance)
    good = chance.random() < 0.6
    return {"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good}


def written(chance: random.Random) -> dict[str, Any]:
    return {"text": " ".join(f"{' '.join(sentence(chance, 8))}." for _ in range(chance.randint(1, 6)))}


def prompted(chance: random.Random) -> dict[str, Any]:
    return {"prompt": " ".join(sentence(chance, 8)), "wanted": chance.choice("aeiou")}


REWARDS = """
def vowels(completions, wanted, **columns):
    return [text.count(letter) / 4 - len(text) / 40 for text, letter in zip(completions, wanted)]
"""
"""A module with a reward function, which write_tiny puts beside the recipes of ROLLING."""
ROLLOUTS: dict[str, Any] = {"kl": 0.0, "sampling": {"max_new_tokens": 6}, "rewards": [{"function": "rewarding:vowels"}]}

TINY: dict[str, tuple[dict[str, Any], Callable[[random.Random], dict[str, Any]]]] = {
    "mlm_nsp": ({"model": {"config": BERT}, "mlm_nsp": {"unit": "word"}}, written),
    "plm": ({"model": {"config": XLNET}, "plm": {"packing": False}}, written),
    "span_corruption": ({"model": {"config": T5}, "span_corruption": {"packing": False, "sentinels": 8}}, written),
    "classification": ({"model": {"config": BERT}, "classification": {"class_weights": "balanced"}}, classified),
    "seq2seq": (
        {
            "model": {"config": T5},
            "seq2seq": {"max_target_length": 12, "label_smoothing": 0.1, "generation": {"max_new_tokens": 4}},
        },
        rewritten,
    ),
    "sft": (
        {"model": {"config": LLAMA}, "sft": {"generation": {"max_new_tokens": 4, "metrics": ["exact_match", "chrf"]}}},
        talked,
    ),
    "regression": ({"model": {"config": BERT}, "regression": {"pair": True}}, rated),
    "token_classification": ({"model": {"config": BERT}, "data": {"max_length": 16}}, tagged),
    "question_answering": (
        {"model": {"config": BERT}, "data": {"max_length": 20}, "question_answering": {"stride": 4}},
        asked,
    ),
    "reward": (  # a higher rate amplifies rounding to 1e-4 of the gradient norm within five updates
        {"model": {"config": LLAMA}, "reward": {"center_rewards_coefficient": 0.01}, "optim": {"lr": 0.001}},
        preferred,
    ),
    "dpo": ({"model": {"config": LLAMA}, "optim": {"lr": 0.001}}, preferred),
    "kto": ({"model": {"config": LLAMA}, "kto": {"undesirable_weight": 1.5}, "optim": {"lr": 0.001}}, judged),
    "ppo": ({"model": {"config": LLAMA}, "ppo": {**ROLLOUTS, "prompts": 12, "epochs": 3}}, prompted),
    "grpo": (
        {"model": {"config": LLAMA}, "grpo": {**ROLLOUTS, "prompts": 3, "group_size": 4, "epochs": 3}},
        prompted,
    ),
    "rloo": (
        {"model": {"config": LLAMA}, "rloo": {**ROLLOUTS, "prompts": 6, "group_size": 2, "epochs": 3}},
        prompted,
    ),
}
"""Task -> what is special in its recipe, and how a row is made."""

ALL = TINY | {
    "clm": ({"model": {"config": LLAMA}, "clm": {"packing": False}}, written),
    "mlm": ({"model": {"config": BERT}, "mlm": {"packing": False}}, written),
}
"""With the tasks whose promise tests lie elsewhere."""
ROLLING = ("ppo", "grpo", "rloo")
"""Tasks that learn from their own responses."""


LAYERS = {"bert": "num_hidden_layers", "llama": "num_hidden_layers", "t5": "num_layers", "xlnet": "n_layer"}


def write_tiny(folder: Path, task: str, dropout: float = 0.0, layers: int = 1, **changes: Any) -> Path:
    """recipe.yaml and rows.jsonl in `folder`: 160 ragged rows, 8 updates of 12 rows, evaluation and save every 4."""
    special, row = ALL[task]
    write_rows(folder / "rows.jsonl", made(160, row))
    if task in ROLLING:
        (folder / "rewarding.py").write_text(REWARDS)
    config = dict(special["model"]["config"])
    config[LAYERS[config["model_type"]]] = layers
    for key in ("attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate", "dropout"):
        if _has(config["model_type"], key):
            config[key] = dropout
    recipe: dict[str, Any] = {
        "task": task,
        **special,
        "model": {"config": config},
        "tokenizer": {"train": {"vocab_size": 320}},
        "data": {"train": [{"path": "rows.jsonl"}], "validation": 0.1, "max_length": 32} | special.get("data", {}),
        "batch": {"global_size": 12, "micro_size": support.MICRO_SIZE},
        "optim": {"lr": 0.01, "warmup": 3, "max_grad_norm": 0.4} | special.get("optim", {}),
        "train": {"max_steps": 8, "precision": "fp32"},
        "eval": {"every": 4},
        "save": {"every": 4, "keep": None},
        "run_dir": "run",
        "log": {"report": False},  # 5 MB
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(evaluated_quickly(merge(recipe, changes)), indent=1))
    return path


def _has(model_type: str, key: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return key in CONFIG_MAPPING[model_type]().to_dict()
