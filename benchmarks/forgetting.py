"""How much of an old task a network forgets while it learns a new one, with and without what ptft offers against it.

    PTFT_TEST_DATA=... PTFT_TEST_MODELS=... python benchmarks/forgetting.py [--methods plain replay ...] [--threads 1]

MiniLM (minilm-l6 in PTFT_TEST_MODELS) says from which book a passage is. Task A has three books of en_gutenberg, task B
three others, by the same or a similar author. One head has all six labels, so that learning B alone makes the network
forget the labels of A (class-incremental learning). Every method starts from the same model of task A and takes the
same number of updates. Replay gets old rows in the place of new ones; distillation and EWC see the old network.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

A = ("austen-emma", "chesterton-brown", "carroll-alice")
B = ("austen-sense", "chesterton-thursday", "bryant-stories")


def write_passages(texts: Path, folder: Path, books: tuple[str, ...], name: str, options: argparse.Namespace) -> None:
    """Train and test rows: passages of `words` consecutive words; test passages are not among the train passages."""
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for book in books:
        words = re.sub(r"\s+", " ", (texts / f"{book}.txt").read_text()).split()
        passages = [" ".join(words[i : i + options.words]) for i in range(500, len(words), options.words)]
        random.Random(0).shuffle(passages)
        for side, first, count in (("train", 0, options.rows), ("test", options.rows, options.test_rows)):
            rows[side] += [{"text": text, "label": book} for text in passages[first : first + count]]
    for side, those in rows.items():
        (folder / f"{name}_{side}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in those))


def recipe(folder: Path, task: str, run: str, options: argparse.Namespace, **sections: Any) -> dict[str, Any]:
    return {
        "task": "classification",
        "data": {
            "train": [{"path": str(folder / f"{task}_train.jsonl")}],
            "validation": [{"path": str(folder / f"{task}_test.jsonl")}],
            "max_length": 2 * options.words,
            "cache_dir": str(folder / "cache"),
        },
        "classification": {"labels": [*A, *B]},
        "batch": {"global_size": 16, "micro_size": 16},
        "optim": {"lr": options.lr, "weight_decay": 0.01, "schedule": "linear", "warmup": 0.1},
        "log": {"tensorboard": False},
        "run_dir": str(folder / run),
        **sections,
        "train": {"max_steps": options.updates_a if run == "old" else options.updates_b, "precision": "fp32"},
    }


def methods(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Method -> sections of the recipe of task B."""
    old_data = [{"path": str(folder / "A_train.jsonl")}]
    model = {"path": str(folder / "old/model")}
    return {
        "plain": {},
        "ewc": {"continual": {"ewc": {"strength": options.ewc, "data": old_data, "rows": options.fisher_rows}}},
        "l2_sp": {"continual": {"l2_sp": {"strength": options.l2_sp}}},
        "replay": {"continual": {"replay": {"data": old_data, "weight": options.replay}}},
        "distillation": {"distillation": {"teacher": model["path"], "temperature": 2.0, "hard": options.hard}},
        "lora": {"model": {**model, "adapt": {"lora": {"r": 16}}}},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(methods(Path(), argparse.Namespace(ewc=0, fisher_rows=0, l2_sp=0, replay=0, hard=0)))
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--updates-a", type=int, default=60)
    parser.add_argument("--updates-b", type=int, default=40)
    parser.add_argument("--rows", type=int, default=320, help="train rows of each book")
    parser.add_argument("--test-rows", type=int, default=60, help="test rows of each book")
    parser.add_argument("--words", type=int, default=16, help="words of a passage")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--ewc", type=float, default=5000.0, help="strength of EWC")
    parser.add_argument("--fisher-rows", type=int, default=96)
    parser.add_argument("--l2-sp", type=float, default=0.01, help="strength of L2-SP")
    parser.add_argument("--replay", type=float, default=0.3, help="fraction of old rows")
    parser.add_argument("--hard", type=float, default=0.5, help="weight of the labels in distillation")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    texts = Path(os.environ["PTFT_TEST_DATA"]) / "text/en_gutenberg"
    pretrained = Path(os.environ["PTFT_TEST_MODELS"]) / "minilm-l6"

    import torch

    import ptft_dist

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for task, books in (("A", A), ("B", B)):
            write_passages(texts, folder, books, task, options)
        new_head = {"path": str(pretrained), "new_head": True}
        old = recipe(folder, "A", "old", options, model=new_head)
        before = ptft_dist.train(old, quiet=True).metrics["eval/accuracy"]
        print(
            f"accuracy on A before: {before:.3f}\n\n| method | A after | B after | s |\n|---|---|---|---|", flush=True
        )
        for method in options.methods:
            started = time.perf_counter()
            sections = {"model": {"path": str(folder / "old/model")}} | methods(folder, options)[method]
            new = recipe(folder, "B", method, options, **sections)
            on_b = ptft_dist.train(new, quiet=True).metrics["eval/accuracy"]
            seconds = time.perf_counter() - started
            model = str(folder / method / "model")
            on_a = ptft_dist.evaluate({**old, "model": {"path": str(folder / "old/model")}}, model=model)
            print(f"| {method} | {on_a['eval/accuracy']:.3f} | {on_b:.3f} | {seconds:.0f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
