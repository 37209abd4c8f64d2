"""A trainer within the test process: one rank, a CPU, a tiny network and rows of known token ids."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from support import Vocabulary, merge
from task_support import make_task as made

from ptft_dist.checkpoint.checkpoint import Checkpoints
from ptft_dist.config.recipe import Recipe
from ptft_dist.data.order import Plan, make_plan
from ptft_dist.data.store import StoreWriter, TokenStore
from ptft_dist.engine import Engine, reset_accelerate
from ptft_dist.networks.load import build_model
from ptft_dist.tasks.protocol import Task
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.training.batches import Shape, SupervisedBatches, UpdateDataset
from ptft_dist.training.stopping import StopRequest
from ptft_dist.training.trainer import Trainer

VOCAB, MAX_LENGTH = 48, 32
NO_CONTEXT: Any = None  # rows that are known beforehand follow from their own step


def make_store(folder: Path, lengths: Sequence[int]) -> TokenStore:
    """One row for each length. Row i begins with the token i (below VOCAB), so that a batch shows which rows it has."""
    chance = random.Random(0)
    writer = StoreWriter(folder, vocab_size=VOCAB, max_length=MAX_LENGTH, packing=False)
    for i, length in enumerate(lengths):
        writer.add([i % VOCAB, *(chance.randrange(VOCAB) for _ in range(length - 1))])
    writer.close()
    return TokenStore.open(folder)


def ragged(count: int) -> list[int]:
    chance = random.Random(1)
    return [chance.randint(2, MAX_LENGTH) for _ in range(count)]


def make_recipe(**changes: Any) -> Recipe:
    network = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    raw: dict[str, Any] = {
        "task": "clm",
        "model": {"config": network},
        "tokenizer": {"path": "none"},
        "data": {"train": [{"path": "none"}], "max_length": MAX_LENGTH},
        "clm": {"packing": False},
        "batch": {"global_size": 6, "micro_size": 3},
        "optim": {"lr": 0.01},
        "train": {"max_steps": 4, "precision": "fp32"},
        "run_dir": "none",
    }
    return recipe_class().model_validate(merge(raw, changes))


def make_dataset(
    recipe: Recipe, store: TokenStore, task: Task, rank: int = 0, world_size: int = 1
) -> tuple[UpdateDataset, Plan]:
    train, batch = recipe.train, recipe.batch
    limits = {"max_steps": train.max_steps, "epochs": train.epochs, "max_tokens": train.max_tokens}
    plan = make_plan(len(store), store.lengths, train.seed, global_size=batch.global_size, **limits)
    shape = Shape(rank, world_size, batch.micro_size, batch.micro_tokens, batch.group_by_length)
    return UpdateDataset(store, plan, shape, task.collate), plan


def make_task(recipe: Recipe) -> Task:
    task: Task = made(recipe, Vocabulary(VOCAB, 0))
    return task


class Kept:
    """A sink that keeps its rows."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))

    def flush(self) -> None: ...

    def close(self) -> None: ...


@contextlib.contextmanager
def make_trainer(
    folder: Path, store: TokenStore, recipe: Recipe, stop: StopRequest | None = None
) -> Iterator[tuple[Trainer, Kept]]:
    """A trainer over `store`, with checkpoints in `folder`, and what it logs."""
    from transformers import AutoConfig

    assert recipe.model.config is not None
    engine = Engine("fp32", None)
    try:
        task, kept = make_task(recipe), Kept()
        config = AutoConfig.for_model(**recipe.model.config)
        engine.prepare(build_model(recipe.model, config, recipe.train.seed, task.auto_class), recipe.optim)
        dataset, plan = make_dataset(recipe, store, task)
        batches = SupervisedBatches(dataset, workers=0, pin_memory=False)
        checkpoints = Checkpoints(folder / "checkpoints")
        facts = {"identity": {}, "kind": "single", "world_size": 1}
        request = stop or StopRequest(None)
        yield (
            Trainer(recipe, engine, task, batches, plan.total_steps, None, checkpoints, facts, request, [kept]),
            kept,
        )
    finally:
        reset_accelerate()
