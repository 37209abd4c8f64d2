"""Whole runs in step with two other implementations: a plain loop that takes documents one by one, and
transformers.Trainer. Same initial weights, same rows in each update, AdamW, the same learning rates: the same losses.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import Vocabulary
from task_support import make_task
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from ptft_dist.checkpoint.checkpoint import Checkpoints
from ptft_dist.config.recipe import Recipe
from ptft_dist.config.resolve import batch_shape
from ptft_dist.data.order import make_plan
from ptft_dist.data.store import Row, StoreWriter, TokenStore
from ptft_dist.engine import Engine, reset_accelerate
from ptft_dist.networks.load import build_model
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.training.batches import Shape, SupervisedBatches, UpdateDataset
from ptft_dist.training.stopping import StopRequest
from ptft_dist.training.trainer import Trainer

VOCAB, PAD, LENGTH, UPDATES = 64, 63, 24, 20
PEAK, WARMUP, DECAY, CLIP = 1e-2, 5, 0.1, 0.7

DECODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **DECODER},
    "qwen3": {"model_type": "qwen3", **DECODER, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 32,
        "resid_pdrop": 0,
        "embd_pdrop": 0,
        "attn_pdrop": 0,
    },
}
# Rows, accumulation and end of run in three ways. A full packed row holds several documents or pieces of them.
LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {
        "clm": {"packing": True},
        "batch": {"global_size": 8, "micro_size": 4},
        "train": {"max_steps": UPDATES},
    },
    "across": {
        "clm": {"packing": True, "attention": "across"},
        "batch": {"global_size": 8, "micro_size": 2},
        "train": {"max_steps": UPDATES},
    },
    "ragged": {
        "clm": {"packing": False},
        "batch": {"global_size": 12, "micro_size": 3},
        "train": {"max_steps": UPDATES},
    },
    "by tokens": {
        "clm": {"packing": False},
        "batch": {"global_tokens": 150, "micro_tokens": 50},
        "train": {"epochs": 1.7},
    },
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are too small for more, and the order of additions stays the same on any machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def rate(step: int, total: int) -> float:
    """Linear warmup to the peak, then half a cosine."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    return PEAK * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (total - WARMUP)))


def recipe(network: str, layout: str) -> Recipe:
    parts = copy.deepcopy(LAYOUTS[layout])
    return recipe_class().model_validate(
        {
            "task": "clm",
            "model": {"config": NETWORKS[network]},
            "tokenizer": {"path": "unused"},
            "data": {"train": [{"path": "unused"}], "max_length": LENGTH},
            "optim": {"lr": PEAK, "warmup": WARMUP, "weight_decay": DECAY, "max_grad_norm": CLIP, "schedule": "cosine"},
            "run_dir": "unused",
            **parts,
            "train": {**parts["train"], "precision": "fp32"},
        }
    )


def write_store(path: Path, packing: bool) -> TokenStore:
    """170 documents of 2 to 60 tokens that follow a noisy rule, so that the loss has something to fall to."""
    chance = random.Random(0)
    writer = StoreWriter(path, vocab_size=VOCAB, max_length=LENGTH, packing=packing)
    for _ in range(170):
        ids = [chance.randrange(VOCAB)]
        length = min(60, 2 + chance.expovariate(0.09))
        while len(ids) < length:
            ids.append((5 * ids[-1] + 1) % VOCAB if chance.random() < 0.7 else chance.randrange(VOCAB))
        writer.add(ids)
    writer.close()
    return TokenStore.open(path)


class Kept:
    """A sink that keeps the rows."""

    def __init__(self) -> None:
        self.rows: list[Mapping[str, Any]] = []

    def write(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def flush(self) -> None: ...
    def close(self) -> None: ...


@dataclass
class Curve:
    """What came of a run, update by update."""

    losses: list[float]
    norms: list[float]
    final: dict[str, torch.Tensor]

    def check(self, other: Curve) -> None:
        assert self.losses == pytest.approx(other.losses, rel=1e-5)
        assert self.norms == pytest.approx(other.norms, rel=1e-3)
        for name, weight in self.final.items():
            # Adam divides by the gradient's size, and with it by that of its rounding.
            assert (weight - other.final[name]).norm() <= 2e-3 * (1 + weight.norm()), name


@dataclass
class Ours:
    """Our run, and what a peer needs to repeat it. updates: the rows of each update, in stream order."""

    curve: Curve
    start: PreTrainedModel
    updates: list[list[Row]]
    micro_size: int | None


def train_ours(tmp_path: Path, network: str, layout: str) -> Ours:
    """As one rank of a run does it, less the tokenizer."""
    settings = recipe(network, layout)
    store = write_store(tmp_path / "store", settings.clm.packing)
    shape = batch_shape(settings, 1)
    plan = make_plan(
        len(store),
        store.lengths,
        settings.train.seed,
        global_size=shape.global_size,
        global_tokens=shape.global_tokens,
        max_steps=settings.train.max_steps,
        epochs=settings.train.epochs,
    )
    reset_accelerate()
    engine = Engine("fp32", None)
    task = make_task(settings, Vocabulary(VOCAB, PAD), device=engine.device)
    keys = {key: value for key, value in NETWORKS[network].items() if key != "model_type"}
    config = CONFIG_MAPPING[network](vocab_size=VOCAB, pad_token_id=PAD, **keys)
    model = build_model(settings.model, config, settings.train.seed, AutoModelForCausalLM)
    start = copy.deepcopy(model)
    engine.prepare(model, settings.optim)
    layout_of_ranks = Shape(0, 1, shape.micro_size, shape.micro_tokens, settings.batch.group_by_length)
    dataset = UpdateDataset(store, plan, layout_of_ranks, task.collate)
    kept = Kept()
    trainer = Trainer(
        settings,
        engine,
        task,
        SupervisedBatches(dataset, workers=0, pin_memory=False),
        plan.total_steps,
        None,
        Checkpoints(tmp_path / "checkpoints"),
        {},
        StopRequest(None),
        [kept],
    )
    assert trainer.fit().finished
    reset_accelerate()
    assert len(kept.rows) == plan.total_steps
    losses, norms = [row["loss"] for row in kept.rows], [row["grad_norm"] for row in kept.rows]
    updates = [[store.row(int(i)) for i in plan.rows_of(step)] for step in range(plan.total_steps)]
    return Ours(Curve(losses, norms, weights(model)), start, updates, shape.micro_size)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# --- a plain loop -----------------------------------------------------------------------------------------------------


def pieces(row: Row, apart: bool) -> list[list[int]]:
    """The row's documents, or all of it where they may see each other."""
    ids = row.input_ids.tolist()
    bounds = [*row.document_starts.tolist(), len(ids)] if apart else [0, len(ids)]
    return [ids[start:stop] for start, stop in itertools.pairwise(bounds)]


def train_plainly(model: PreTrainedModel, updates: list[list[Row]], apart: bool) -> Curve:
    """No padding, no packing, no accumulation, no fused optimizer: one document after the other."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    losses, norms = [], []
    for step, rows in enumerate(updates):
        documents = [ids for row in rows for ids in pieces(row, apart) if len(ids) > 1]
        count = sum(len(ids) - 1 for ids in documents)
        total = 0.0
        for ids in documents:
            logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            loss = -logprobs[range(len(ids) - 1), ids[1:]].sum()
            (loss / count).backward()
            total += loss.item()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
        for parameter in model.parameters():
            if parameter.grad is not None and norm > CLIP:
                parameter.grad *= CLIP / norm
        for group in optimizer.param_groups:
            group["lr"] = rate(step, len(updates))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total / count)
        norms.append(norm)
    return Curve(losses, norms, weights(model))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_plain_loop_goes_through_the_same_losses(tmp_path: Path, network: str, layout: str) -> None:
    ours = train_ours(tmp_path, network, layout)
    assert ours.curve.losses[-1] < ours.curve.losses[0] - 0.3, "it learns"
    assert sum(norm > CLIP for norm in ours.curve.norms) > 3, "clipping is part of the comparison"
    ours.curve.check(train_plainly(ours.start, ours.updates, apart=layout != "across"))


def test_the_layout_by_tokens_ends_with_a_short_update(tmp_path: Path) -> None:
    """So that the comparison above has updates of unequal size, and one that the end of the run cuts off."""
    updates = train_ours(tmp_path, "llama", "by tokens").updates
    sizes = [sum(len(row.input_ids) for row in rows) for rows in updates]
    assert len(updates) > UPDATES
    assert max(sizes) <= 150
    assert sizes[-1] < min(sizes[:-1])


# --- transformers.Trainer ---------------------------------------------------------------------------------------------


def labelled(row: Row, apart: bool) -> dict[str, list[int]]:
    """A row as transformers wants it: labels not yet shifted, and none at the first token of a document.

    Nothing predicts that one, but for GPT-2 transformers 5.23 would count it, and divide by too much.
    """
    labels, positions = [], []
    for document in pieces(row, apart):
        labels += [-100, *document[1:]]
        positions += range(len(document))
    encoded = {"input_ids": row.input_ids.tolist(), "labels": labels}
    return {**encoded, "position_ids": positions} if apart else encoded


def pad_right(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": PAD, "labels": -100, "position_ids": 0}
    batch = {
        key: torch.tensor([row[key] + [padding[key]] * (width - len(row[key])) for row in rows]) for key in rows[0]
    }
    if "position_ids" not in batch:
        lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
        batch["attention_mask"] = (torch.arange(width) < lengths).long()
    return batch


def train_with_transformers(
    tmp_path: Path, model: PreTrainedModel, updates: list[list[Row]], micro_size: int, make_row: Callable[[Row], Any]
) -> Curve:
    """Rows in stream order, padded as they come, with the gradient accumulation of transformers."""
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": DECAY},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=PEAK,
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, len(updates)) / PEAK)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "transformers"),
        per_device_train_batch_size=micro_size,
        gradient_accumulation_steps=len(updates[0]) // micro_size,
        max_steps=len(updates),
        max_grad_norm=CLIP,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=[make_row(row) for rows in updates for row in rows],
        data_collator=pad_right,
        optimizers=(optimizer, schedule),
    )
    trainer.train()
    reset_accelerate()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return Curve([row["loss"] for row in logs], [row["grad_norm"] for row in logs], weights(model))


@pytest.mark.parametrize("network", ["llama", "gpt2"])
@pytest.mark.parametrize("layout", ["packed", "across", "ragged"])
def test_transformers_goes_through_the_same_losses(tmp_path: Path, network: str, layout: str) -> None:
    ours = train_ours(tmp_path, network, layout)
    assert ours.micro_size is not None
    assert len({len(rows) for rows in ours.updates}) == 1
    apart = layout == "packed"
    theirs = train_with_transformers(
        tmp_path, ours.start, ours.updates, ours.micro_size, lambda row: labelled(row, apart)
    )
    assert len(theirs.losses) == UPDATES
    ours.curve.check(theirs)
