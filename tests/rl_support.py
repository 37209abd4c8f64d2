"""Tasks that learn from rewards, within the test process: a tiny fp32 Llama, and rollouts written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from support import merge
from task_support import make_task
from transformers import LlamaConfig, LlamaForCausalLM

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.store import Row
from ptft_dist.rl.rollout import Prompt, Trajectory
from ptft_dist.tasks.protocol import Batch
from ptft_dist.tasks.registry import recipe_class

VOCAB, PAD, EOS = 24, 0, 1


class Numbers:
    """The part of a tokenizer that a task uses; its texts are the ids."""

    pad_token_id, eos_token_id, chat_template = PAD, EOS, None

    def __len__(self) -> int:
        return VOCAB

    def batch_decode(self, ids: Sequence[Sequence[int]], **_options: Any) -> list[str]:
        return [" ".join(map(str, each)) for each in ids]


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """With weights so large that probabilities differ."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    return LlamaForCausalLM(LlamaConfig(**(values | changes)))


def recipe(task: str, settings: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    """A recipe for a pretrained network, whose files nobody reads."""
    raw: dict[str, Any] = {
        "task": task,
        "model": {"path": "none"},
        "tokenizer": {"path": "none"},
        "data": {"train": [{"path": "none"}], "max_length": 16},
        task: {
            "sampling": {"max_new_tokens": 8},
            "prompts": 2 if task in ("grpo", "rloo") else 6,
            "rewards": [{"function": "ptft_dist.rl.rewards:final_number"}],
        },
        "batch": {"global_size": 2, "micro_size": 2},
        "train": {"max_steps": 4, "precision": "fp32"},
        "run_dir": "none",
    }
    if task in ("grpo", "rloo"):
        raw[task]["group_size"] = 3
    return recipe_class().model_validate(merge(merge(raw, {task: settings or {}}), changes))


def task_for(model: Any, task: str, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """The task for this network, which is extended for it."""
    made = recipe(task, settings)
    task_object = make_task(made, options.pop("tokenizer", Numbers()), options.pop("survey", None), model=model)
    task_object.extend_network(model, made.model)
    return task_object


def trajectory(prompt: Sequence[int], response: Sequence[int], score: float = 0.0, **columns: Any) -> Trajectory:
    """A response to a prompt of these ids."""
    each = Trajectory(
        Prompt(0, np.array(prompt, np.int64), "a prompt", columns),
        0,
        np.array(response, np.int64),
        EOS in response,
    )
    each.score = score
    return each


def some_trajectories(count: int = 6, seed: int = 0) -> list[Trajectory]:
    """Ragged prompts and responses with random scores; some end with EOS. Three follow the same prompt."""
    chance = np.random.default_rng(seed)
    result = []
    for i in range(count):
        if i % 3 == 0:
            prompt = chance.integers(2, VOCAB, int(chance.integers(1, 7))).tolist()
        response = chance.integers(2, VOCAB, int(chance.integers(1, 8))).tolist()
        result.append(trajectory(prompt, [*response, EOS] if i % 2 else response, float(chance.normal())))
    return result


def look(task: Any, call: Any, model: Any, trajectories: Sequence[Trajectory]) -> None:
    """Add what `call` says about each response to its tokens, all rows in one micro-batch."""
    with torch.no_grad():
        found = call(model, task._inputs_of(trajectories))
    for b, each in enumerate(trajectories):
        each.tokens |= {name: x[b, : len(each.response)].numpy().copy() for name, x in found.items()}


def batch_of(task: Any, trajectories: Sequence[Trajectory]) -> Batch:
    rows: list[Row] = [task.as_row(each) for each in trajectories]
    batch: Batch = task.collate(rows)
    return batch
