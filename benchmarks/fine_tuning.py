"""Useful tokens per second of ours, and of what people use now, on rows of unequal length.

sft: TRL's SFTTrainer, as it comes and with its packing. mlm: transformers.Trainer with padded rows, as run_mlm does.
All start from the same weights. Ours and the padded peer take the same rows (and masks) in the same updates with the
same optimizer and learning rates, so their losses must agree, or the script fails. TRL's packing puts other rows
together, with as many tokens in an update: there, only the speed is compared. They take turns update by update (see
loop.py).

    python benchmarks/fine_tuning.py [--case sft|mlm] [--rows FILE.jsonl] [--updates 8] [--repeats 3] [--threads N]
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from loop import LOSS_TOLERANCE, WARM_UP_UPDATES, Clock, Log, Ticks, adamw, medians, race, write_corpus
from transformers import PreTrainedModel

from ptft_dist.checkpoint.checkpoint import Checkpoints
from ptft_dist.config.recipe import Recipe
from ptft_dist.config.resolve import batch_shape
from ptft_dist.data.order import Plan, make_plan
from ptft_dist.data.prepare import prepare
from ptft_dist.data.store import Row
from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.engine import Engine
from ptft_dist.networks.facts import read_facts
from ptft_dist.networks.load import build_config, build_model
from ptft_dist.reporting.metrics import JsonLines
from ptft_dist.tasks.common.padding import pad
from ptft_dist.tasks.protocol import Task, TaskSetup
from ptft_dist.tasks.registry import encoder_class, recipe_class, task_class
from ptft_dist.training.batches import Shape, SupervisedBatches, UpdateDataset
from ptft_dist.training.stopping import StopRequest
from ptft_dist.training.trainer import Trainer

LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
BERT = {
    "model_type": "bert",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
MICRO = 8  # rows of a forward pass of the peers, and ours
AIMS = {"sft": 2.0, "mlm": 1.8}


@dataclass
class Job:
    recipe: Recipe
    task: Task
    model: PreTrainedModel
    tokenizer: Any
    dataset: UpdateDataset
    plan: Plan
    rows: list[list[Row]]
    keys: list[list[tuple[int, int]]]
    folder: Path

    def rate(self, step: int) -> float:
        """Half a cosine, as the recipe says."""
        return self.recipe.optim.lr * 0.5 * (1 + math.cos(math.pi * step / len(self.rows)))


def make_job(case: str, folder: Path, rows: str | None, updates: int, group: int) -> Job:
    tokenizer_section = {"train": {"vocab_size": 4096}}
    if case == "sft":
        source = {"path": str(Path(rows).absolute())} if rows else {"source": "python-functions"}
        special: dict[str, Any] = {"sft": {} if rows else {"shape": "messages"}, "model": {"config": LLAMA}}
        more = {"bad_rows": "skip"}
    else:
        if rows:
            source = {"path": str(Path(rows).absolute()), "document": "line"}
        else:
            folder.mkdir()
            write_corpus(folder / "corpus.jsonl", 0)
            source = {"path": "corpus.jsonl"}
        special, more = {"mlm": {"packing": False}, "model": {"config": BERT}}, {}
    recipe = recipe_class().model_validate(
        {
            "task": case,
            "tokenizer": tokenizer_section,
            "data": {"train": [source], "max_length": 256, "cache_dir": str(folder / "cache"), **more},
            "batch": {"global_size": group, "micro_size": MICRO},
            "optim": {
                "lr": 1e-3,
                "betas": (0.9, 0.95),
                "weight_decay": 0.1,
                "max_grad_norm": 1.0,
                "schedule": "cosine",
            },
            "train": {"max_steps": updates, "precision": "fp32"},
            "run_dir": str(folder),
            **special,
        }
    )
    prepared = prepare(recipe, folder, encoder_class(recipe.task))
    store, tokenizer, shape = prepared.train, load_tokenizer(prepared.tokenizer_path), batch_shape(recipe, 1)
    plan = make_plan(len(store), store.lengths, 0, global_size=shape.global_size, max_steps=updates)
    config = build_config(recipe.model, tokenizer, recipe.data.max_length)
    model = build_model(recipe.model, config, 0, task_class(case).auto_class)
    task = task_class(case)(TaskSetup.of(recipe, tokenizer, prepared.survey), read_facts(model), torch.device("cpu"))
    task.prepare_network(model)
    layout = Shape(0, 1, shape.micro_size, shape.micro_tokens, group_by_length=True)
    dataset = UpdateDataset(store, plan, layout, task.collate)
    keys = [
        [(int(e), int(r)) for e, r in zip(plan.epochs_of(step), plan.rows_of(step), strict=True)]
        for step in range(updates)
    ]
    taken = [[store.row(row) for _, row in update] for update in keys]
    return Job(recipe, task, model, tokenizer, dataset, plan, taken, keys, folder)


# --- the contenders ---------------------------------------------------------------------------------------------------


def run_ours(job: Job, clock: Clock) -> None:
    engine = Engine("fp32", None)
    engine.prepare(copy.deepcopy(job.model), job.recipe.optim)
    with tempfile.TemporaryDirectory(dir=job.folder) as run_dir:
        metrics = JsonLines(Path(run_dir) / "metrics.jsonl", 0, -1)
        batches = SupervisedBatches(job.dataset, workers=0, pin_memory=False)
        sinks = [metrics, Ticks(clock)]
        checkpoints, stop = Checkpoints(Path(run_dir) / "checkpoints"), StopRequest(None)
        Trainer(job.recipe, engine, job.task, batches, len(job.rows), None, checkpoints, {}, stop, sinks).fit()
        metrics.close()


def settings(job: Job, name: str) -> dict[str, Any]:
    return {
        "output_dir": str(job.folder / name),
        "max_steps": len(job.rows),
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }


def optimizers(job: Job, model: PreTrainedModel) -> tuple[Any, Any]:
    optimizer = adamw(model, job.recipe.optim.lr)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: job.rate(s) / job.recipe.optim.lr)


def trl(
    job: Job, clock: Clock, name: str, rows: list[dict[str, Any]], micro: int, accumulation: int, **more: Any
) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    model = copy.deepcopy(job.model)
    config = SFTConfig(
        **settings(job, name),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        max_length=job.recipe.data.max_length,
        bf16=False,
        gradient_checkpointing=False,
        **more,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=job.tokenizer,
        optimizers=optimizers(job, model),
        callbacks=[Log(clock)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def labelled(row: Row) -> dict[str, Any]:
    labels = np.where(row.columns["learned"] == 1, row.input_ids, -100)
    return {"input_ids": row.input_ids.tolist(), "labels": labels.tolist()}


def run_trl(job: Job, clock: Clock) -> None:
    rows = [labelled(row) for update in job.rows for row in update]
    trl(job, clock, "trl", rows, MICRO, len(job.rows[0]) // MICRO)


def run_trl_packed(job: Job, clock: Clock) -> None:
    """Its own packing of the same rows, in rows of data.max_length; about as many tokens in an update as ours."""
    flat = [row for update in job.rows for row in update]
    tokens = sum(len(row.input_ids) for row in flat) / len(job.rows)
    rows = max(1, round(tokens / job.recipe.data.max_length))
    repeated = list(itertools.islice(itertools.cycle([labelled(row) for row in flat]), 2 * len(flat)))
    trl(job, clock, "trl-packed", repeated, rows, 1, packing=True)


def run_padded(job: Job, clock: Clock) -> None:
    """transformers.Trainer, with the masks that ours draws and each micro-batch padded to its longest row."""
    model = copy.deepcopy(job.model)
    pad_id = job.tokenizer.pad_token_id

    def collate(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        seen = [np.array(item["input_ids"]) for item in items]
        return {
            "input_ids": pad(seen, pad_id),
            "labels": pad([np.array(item["labels"]) for item in items], -100),
            "attention_mask": pad([np.ones(len(ids), np.int64) for ids in seen], 0),
        }

    items = []
    for row, key in zip(itertools.chain(*job.rows), itertools.chain(*job.keys), strict=True):
        ids, labels = job.task.rows.masker.mask(row.input_ids, np.random.default_rng((job.recipe.train.seed, *key)))  # type: ignore[attr-defined]
        items.append({"input_ids": ids, "labels": labels})
    arguments = transformers.TrainingArguments(
        **settings(job, "transformers"),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=len(job.rows[0]) // MICRO,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=items,
        data_collator=collate,
        optimizers=optimizers(job, model),
        callbacks=[Log(clock)],
        compute_loss_func=summed_loss,  # its own gives BERT a loss that grows with the accumulation
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()


def summed_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


CONTENDERS: dict[str, dict[str, Callable[[Job, Clock], None]]] = {
    "sft": {"ours": run_ours, "trl": run_trl, "trl packed": run_trl_packed},
    "mlm": {"ours": run_ours, "padded": run_padded},
}


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(case: str, job: Job, repeats: int) -> bool:
    contenders = CONTENDERS[case]
    peers = [name for name in contenders if name != "ours"]
    lengths = [len(row.input_ids) for update in job.rows for row in update]
    print(
        f"\n{case}: {sum(p.numel() for p in job.model.parameters()):,} parameters, {len(job.rows)} updates of "
        f"{len(job.rows[0])} rows, {statistics.mean(lengths):.0f} tokens a row (the longest {max(lengths)})"
    )
    print(
        f"{'repeat':>8}" + "".join(f"{name:>14}" for name in contenders) + "".join(f"{'ours/' + p:>18}" for p in peers)
    )
    useful = sum(len(row.input_ids) for update in job.rows[WARM_UP_UPDATES:] for row in update)
    speeds: list[dict[str, float]] = []
    by_cpu: list[dict[str, float]] = []
    agree = True
    for repeat in range(repeats):
        clocks = race(job, contenders)
        tokens = dict.fromkeys(contenders, useful)
        if "trl packed" in tokens:
            tokens["trl packed"] = packed_tokens(job)
        updates = len(job.rows) - WARM_UP_UPDATES
        wall = {n: sum(c.wall[WARM_UP_UPDATES : WARM_UP_UPDATES + updates]) for n, c in clocks.items()}
        cpu = {n: sum(c.cpu[WARM_UP_UPDATES : WARM_UP_UPDATES + updates]) for n, c in clocks.items()}
        speeds.append({name: tokens[name] / wall[name] for name in contenders})
        by_cpu.append({p: (tokens["ours"] / cpu["ours"]) / (tokens[p] / cpu[p]) for p in peers})
        ratios = {p: speeds[-1]["ours"] / speeds[-1][p] for p in peers}
        print_row(str(repeat + 1), speeds[-1], ratios)
        padded = peers[0]
        pairs = zip(clocks["ours"].losses, clocks[padded].losses, strict=False)
        apart = max(abs(a - b) / b for a, b in pairs)
        agree = agree and apart <= LOSS_TOLERANCE
    middle = medians(speeds)
    ratios = {p: middle["ours"] / middle[p] for p in peers}
    print_row("median", middle, ratios)
    print(f"{'in CPU s':>8}" + " " * 14 * len(contenders) + "".join(f"{medians(by_cpu)[p]:>18.2f}" for p in peers))
    reached = all(ratio >= AIMS[case] for ratio in ratios.values())
    print(f"aim: {AIMS[case]} times each: {'reached' if reached else 'missed'}")
    print(
        f"losses of ours and {peers[0]} {'agree' if agree else 'DO NOT AGREE'}, largest relative difference {apart:.1e}"
    )
    return agree


def packed_tokens(job: Job) -> float:
    """Useful tokens that TRL's packed updates hold on average: its rows are nearly full."""
    flat = [row for update in job.rows for row in update]
    tokens = sum(len(row.input_ids) for row in flat) / len(job.rows)
    rows = max(1, round(tokens / job.recipe.data.max_length))
    return rows * job.recipe.data.max_length * (len(job.rows) - WARM_UP_UPDATES)


def print_row(label: str, speeds: dict[str, float], ratios: dict[str, float]) -> None:
    cells = "".join(f"{value:>14,.0f}" for value in speeds.values())
    print(f"{label:>8}{cells}" + "".join(f"{value:>18.2f}" for value in ratios.values()), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CONTENDERS), help="only this one")
    parser.add_argument("--rows", help="a file of rows for sft, or of lines for mlm; the standard library if not given")
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--global-size", type=int, default=64, help="rows of an update")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of PyTorch; as many as it likes if not given")
    options = parser.parse_args()
    if options.updates <= WARM_UP_UPDATES:
        parser.error(f"--updates: the first {WARM_UP_UPDATES} are not timed, so more are needed")
    if options.threads:
        torch.set_num_threads(options.threads)
    transformers.utils.logging.set_verbosity_error()
    print(f"useful tokens per second; torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, one process")
    agree = True
    with tempfile.TemporaryDirectory() as name:
        for case in [options.case] if options.case else list(CONTENDERS):
            job = make_job(case, Path(name) / case, options.rows, options.updates, options.global_size)
            agree = compare(case, job, options.repeats) and agree
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
