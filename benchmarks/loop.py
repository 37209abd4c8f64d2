"""Useful tokens per second of our trainer, of a bare PyTorch loop and of transformers.Trainer, side by side.

All three start from the same weights and take the same rows in the same updates with the same optimizer and learning
rates; the script checks that their losses agree. They take turns update by update, each in a thread that waits while
the others work, so that a machine that is busy with other things slows all of them alike. Padding does not count as
useful.

    python benchmarks/loop.py [--updates 10] [--repeats 5] [--seed 0] [--threads N] [--case full|ragged]
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from transformers import PreTrainedModel

from ptft_dist.checkpoint.checkpoint import Checkpoints
from ptft_dist.config.recipe import Recipe, Source
from ptft_dist.config.resolve import batch_shape
from ptft_dist.data.order import make_plan
from ptft_dist.data.prepare import prepare
from ptft_dist.data.sources import read_documents
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.engine import Engine, reset_accelerate
from ptft_dist.networks.facts import read_facts
from ptft_dist.networks.load import build_config, build_model
from ptft_dist.reporting.metrics import JsonLines
from ptft_dist.tasks.clm.task import CausalLM
from ptft_dist.tasks.protocol import Batch, TaskSetup
from ptft_dist.tasks.registry import encoder_class, recipe_class
from ptft_dist.training.batches import Shape, SupervisedBatches, UpdateDataset
from ptft_dist.training.stopping import StopRequest
from ptft_dist.training.trainer import Trainer

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
CASES: dict[str, dict[str, Any]] = {
    "full": {"clm": {"packing": True, "attention": "across"}, "batch": {"global_size": 8, "micro_size": 4}},
    "ragged": {"clm": {"packing": False}, "batch": {"global_size": 32, "micro_size": 8}},
}
PEERS = ("bare", "transformers")
AIMS = {"full": ("bare", 0.98), "ragged": ("transformers", 1.15)}
WARM_UP_UPDATES = 2  # not timed: the first ones allocate memory
LOSS_TOLERANCE = 1e-4
DECAY, CLIP, BETAS = 0.1, 1.0, (0.9, 0.95)


class Clock:
    """One contender's time by the clock and in CPU seconds, and its losses. A tick ends an update and hands on."""

    def __init__(self, done: threading.Semaphore) -> None:
        self.turn, self.done = threading.Semaphore(0), done
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def start(self) -> None:
        self.turn.acquire()
        self.started = time.perf_counter(), time.process_time()

    def tick(self, loss: float) -> None:
        self.wall.append(time.perf_counter() - self.started[0])
        self.cpu.append(time.process_time() - self.started[1])
        self.losses.append(loss)
        self.done.release()
        self.start()


@dataclass
class Job:
    """What all contenders do. groups: our micro-batches of each update; rows: the same rows in the plan's order."""

    recipe: Recipe
    dataset: UpdateDataset
    task: CausalLM
    model: PreTrainedModel
    folder: Path
    groups: list[list[Batch]]
    rows: list[list[Row]]

    @property
    def tokens(self) -> list[int]:
        return [sum(len(row.input_ids) for row in rows) for rows in self.rows]

    def rate(self, step: int) -> float:
        """Half a cosine, as the recipe says."""
        return self.recipe.optim.lr * 0.5 * (1 + math.cos(math.pi * step / len(self.rows)))


def write_corpus(path: Path, seed: int, count: int = 20_000) -> None:
    """A seeded choice of paragraphs of the Python standard library's source, one document each."""
    modules = read_documents(Source(source="python-stdlib"), path.parent)
    found = [part for module in modules for part in re.split(r"\n\s*\n", module.text) if part.strip()]
    chosen = random.Random(seed).sample(found, min(count, len(found)))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")


def make_job(case: str, folder: Path, updates: int, seed: int) -> Job:
    recipe = recipe_class().model_validate(
        {
            "task": "clm",
            "model": {"config": LLAMA},
            "tokenizer": {"train": {"vocab_size": 4096, "max_megabytes": 4}},
            "data": {"train": [{"path": "corpus.jsonl"}], "max_length": 256, "cache_dir": "cache"},
            "optim": {"lr": 1e-3, "betas": BETAS, "weight_decay": DECAY, "max_grad_norm": CLIP, "schedule": "cosine"},
            "train": {"max_steps": updates, "seed": seed, "precision": "fp32"},
            "run_dir": str(folder),
            **CASES[case],
        }
    )
    prepared = prepare(recipe, folder, encoder_class(recipe.task))
    store, tokenizer, shape = prepared.train, load_tokenizer(prepared.tokenizer_path), batch_shape(recipe, 1)
    plan = make_plan(len(store), store.lengths, seed, global_size=shape.global_size, max_steps=updates)
    config = build_config(recipe.model, tokenizer, recipe.data.max_length)
    model = build_model(recipe.model, config, seed, CausalLM.auto_class)
    task = CausalLM(TaskSetup.of(recipe, tokenizer, {}), read_facts(model), torch.device("cpu"))
    layout = Shape(0, 1, shape.micro_size, shape.micro_tokens, recipe.batch.group_by_length)
    dataset = UpdateDataset(store, plan, layout, task.collate)
    groups = [dataset[step] for step in range(updates)]
    rows = [[store.row(int(i)) for i in plan.rows_of(step)] for step in range(updates)]
    return Job(recipe, dataset, task, model, folder, groups, rows)


# --- the contenders ---------------------------------------------------------------------------------------------------


def run_ours(job: Job, clock: Clock) -> None:
    """The trainer as one rank of a run has it, metrics.jsonl included."""
    engine = Engine("fp32", None)
    engine.prepare(copy.deepcopy(job.model), job.recipe.optim)
    with tempfile.TemporaryDirectory(dir=job.folder) as run_dir:
        metrics = JsonLines(Path(run_dir) / "metrics.jsonl", 0, -1)
        trainer = Trainer(
            job.recipe,
            engine,
            job.task,
            SupervisedBatches(job.dataset, workers=0, pin_memory=False),
            len(job.rows),
            None,
            Checkpoints(Path(run_dir) / "checkpoints"),
            {},
            StopRequest(None),
            [metrics, Ticks(clock)],
        )
        trainer.fit()
        metrics.close()


class Ticks:
    """A sink that stands last, so that a tick comes when the row is written."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def write(self, row: Mapping[str, Any]) -> None:
        self.clock.tick(row["loss"])

    def flush(self) -> None: ...
    def close(self) -> None: ...


def run_bare(job: Job, clock: Clock) -> None:
    """The least that can be written: our micro-batches, already in memory, and nothing logged."""
    model = copy.deepcopy(job.model)
    optimizer = adamw(model, job.recipe.optim.lr)
    for step, group in enumerate(job.groups):
        count = sum(batch.count for batch in group)
        total = torch.zeros(())
        for batch in group:
            targets = batch.inputs["targets"]
            logits = model(input_ids=batch.inputs["input_ids"], use_cache=False).logits
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), reduction="sum") / count
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for parameters in optimizer.param_groups:
            parameters["lr"] = job.rate(step)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(total.item())


def run_transformers(job: Job, clock: Clock) -> None:
    """Rows in the plan's order, padded to the longest of each micro-batch as they come."""
    assert job.recipe.batch.micro_size is not None
    model = copy.deepcopy(job.model)
    optimizer = adamw(model, job.recipe.optim.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: job.rate(step) / job.recipe.optim.lr)
    arguments = transformers.TrainingArguments(
        output_dir=str(job.folder / "transformers"),
        per_device_train_batch_size=job.recipe.batch.micro_size,
        gradient_accumulation_steps=len(job.rows[0]) // job.recipe.batch.micro_size,
        max_steps=len(job.rows),
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
        train_dataset=[{"input_ids": row.input_ids} for rows in job.rows for row in rows],
        data_collator=pad_right,
        optimizers=(optimizer, schedule),
        callbacks=[Log(clock)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


class Log(transformers.TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:  # noqa: ARG002
        if "loss" in logs:
            self.clock.tick(logs["loss"])


def pad_right(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """input_ids, labels, and an attention mask where there is padding: [B, longest]."""
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    ids = torch.zeros((len(rows), int(lengths.max())), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = torch.from_numpy(row["input_ids"])
    mask = torch.arange(ids.size(1)) < lengths[:, None]
    batch = {"input_ids": ids, "labels": ids.masked_fill(~mask, -100)}
    return batch if mask.all() else {**batch, "attention_mask": mask.long()}


def adamw(model: PreTrainedModel, lr: float) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=1e-8, fused=True)


CONTENDERS: dict[str, Callable[[Job, Clock], None]] = {
    "ours": run_ours,
    "bare": run_bare,
    "transformers": run_transformers,
}


# --- the comparison ---------------------------------------------------------------------------------------------------


def race(job: Any, contenders: Mapping[str, Callable[[Any, Clock], None]]) -> dict[str, Clock]:
    """All contenders once through the job, one update each in turn."""
    reset_accelerate()
    done = threading.Semaphore(0)
    clocks = {name: Clock(done) for name in contenders}

    def contend(name: str) -> None:
        try:
            clocks[name].start()
            contenders[name](job, clocks[name])
        finally:
            done.release()

    with ThreadPoolExecutor(len(contenders)) as threads:
        running = {name: threads.submit(contend, name) for name in contenders}
        for _ in range(len(job.rows) + 1):  # the last turn is for what comes after the last update
            for name, clock in clocks.items():
                if not running[name].done():
                    clock.turn.release()
                    done.acquire()
        for future in running.values():
            future.result()
    reset_accelerate()
    return clocks


def compare(case: str, job: Job, repeats: int) -> bool:
    """Print the case's table; True if the three went through the same losses."""
    print(f"\n{case}: {describe(job)}")
    print(f"{'repeat':>8}" + "".join(f"{name:>14}" for name in CONTENDERS) + f"{'ours/bare':>14}{'ours/transf.':>14}")
    useful = sum(job.tokens[WARM_UP_UPDATES:])
    speeds: list[dict[str, float]] = []
    by_clock: list[dict[str, float]] = []
    by_cpu: list[dict[str, float]] = []
    curves: dict[str, list[float]] = {}
    for repeat in range(repeats):
        clocks = race(job, CONTENDERS)
        curves = {name: clock.losses for name, clock in clocks.items()}
        assert all(len(losses) == len(job.rows) for losses in curves.values())
        wall = {name: sum(clock.wall[WARM_UP_UPDATES:]) for name, clock in clocks.items()}
        cpu = {name: sum(clock.cpu[WARM_UP_UPDATES:]) for name, clock in clocks.items()}
        speeds.append({name: useful / seconds for name, seconds in wall.items()})
        by_clock.append({peer: wall[peer] / wall["ours"] for peer in PEERS})
        by_cpu.append({peer: cpu[peer] / cpu["ours"] for peer in PEERS})
        print_row(str(repeat + 1), speeds[-1], by_clock[-1])
    ratio = medians(by_clock)
    print_row("median", medians(speeds), ratio)
    print_row("CPU s", {}, medians(by_cpu))
    peer, aim = AIMS[case]
    print(f"aim: ours / {peer} >= {aim}: {'reached' if ratio[peer] >= aim else 'missed'}, {ratio[peer]:.3f}")
    apart = max(abs(a - b) / b for peer in PEERS for a, b in zip(curves["ours"], curves[peer], strict=True))
    agree = apart <= LOSS_TOLERANCE
    print(
        f"losses {curves['ours'][0]:.4f} ... {curves['ours'][-1]:.4f}: the three curves "
        f"{'agree' if agree else 'DO NOT AGREE'}, largest relative difference {apart:.1e}"
    )
    return agree


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def describe(job: Job) -> str:
    """Sizes, and how much of what goes through the network is padding."""
    size = job.recipe.batch.micro_size or 1
    useful = sum(job.tokens)
    ours = sum(batch.inputs["input_ids"].numel() for group in job.groups for batch in group)
    flat = [len(row.input_ids) for rows in job.rows for row in rows]
    theirs = sum(size * max(flat[i : i + size]) for i in range(0, len(flat), size))
    parameters = sum(p.numel() for p in job.model.parameters())
    return (
        f"{parameters:,} parameters, {len(job.rows)} updates of {len(job.rows[0])} rows (micro-batches of {size}), "
        f"{statistics.mean(flat):.0f} tokens a row; padding: ours and bare {1 - useful / ours:.0%}, "
        f"transformers {1 - useful / theirs:.0%}"
    )


def print_row(label: str, speeds: dict[str, float], shares: dict[str, float]) -> None:
    cells = "".join(f"{value:>14,.0f}" for value in speeds.values()) or " " * 14 * len(CONTENDERS)
    print(f"{label:>8}{cells}" + "".join(f"{value:>14.3f}" for value in shares.values()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="of PyTorch; as many as it likes if not given")
    parser.add_argument("--case", choices=list(CASES), help="only this one")
    options = parser.parse_args()
    if options.updates <= WARM_UP_UPDATES:
        parser.error(f"--updates: the first {WARM_UP_UPDATES} are not timed, so more are needed")
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"useful tokens per second; {versions}, {torch.get_num_threads()} threads, fp32, one process")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl", options.seed)
        cases = [options.case] if options.case else list(CASES)
        agree = [
            compare(case, make_job(case, folder, options.updates, options.seed), options.repeats) for case in cases
        ]
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
