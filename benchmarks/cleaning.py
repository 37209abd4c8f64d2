"""Does cleaning help? The same small network is pretrained on raw and on cleaned text with an equal number of tokens.

    python benchmarks/cleaning.py DATA [--seeds 3] [--updates 300]

DATA is a directory with dirty/ (web pages as HTML, tweets and comments with repeats) and text/ (C4, WikiText-2, books).
Raw: everything as it is. Cleaned: data.steps. Both networks use a tokenizer that was learned from a book which is in
neither. Both are judged on clean text that is in neither: the last 40 documents of C4, and WikiText-2.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ptft_dist import api

STEPS: dict[str, list[Any]] = {
    "raw": [],
    "deduplicated": ["exact_dedup", "near_dedup"],
    "cleaned": [
        "html",
        "unicode",
        "control",
        "whitespace",
        {"language": {"keep": ["en"]}},
        {"quality": {"rules": ["gopher", "fineweb"], "min_words": 20}},
        "repetition",
        "exact_dedup",
        "near_dedup",
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        held_out(arguments.data, folder)
        losses: dict[str, list[float]] = {}
        for seed in range(arguments.seeds):
            for kind, steps in STEPS.items():
                result = api.train(recipe(arguments.data.absolute(), folder, kind, steps, seed, arguments.updates))
                read = json.loads((folder / f"{kind}-{seed}/result.json").read_text())["tokens"]
                report = json.loads((folder / f"{kind}-{seed}/data_report.json").read_text())
                losses.setdefault(kind, []).append(result.metrics["eval/loss"])
                print(
                    f"{kind:<13} seed {seed}: {report['train']['tokens']:>9,} tokens of text, {read:,} read, "
                    f"held-out loss {losses[kind][-1]:.4f}, perplexity {math.exp(losses[kind][-1]):.1f}",
                    flush=True,
                )
    for kind, values in losses.items():
        mean = statistics.mean(values)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{kind:<13} loss {mean:.4f} +- {spread:.4f}, perplexity {math.exp(mean):.1f}")


def held_out(data: Path, folder: Path) -> None:
    """Write the part of C4 to train on and the part to judge by, the latter with half of WikiText-2."""
    rows = (data / "text/en_c4_demo.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "c4_train.jsonl").write_text("".join(rows[:-40]), encoding="utf-8")
    wiki = (data / "text/en_wikitext2_valid.txt").read_text(encoding="utf-8")[:100_000]
    judged = [*rows[-40:], json.dumps({"text": wiki}) + "\n"]
    (folder / "held_out.jsonl").write_text("".join(judged), encoding="utf-8")


def recipe(data: Path, folder: Path, kind: str, steps: list[Any], seed: int, updates: int) -> dict[str, Any]:
    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        book = {"train": [{"path": str(data / "text/en_gutenberg/bryant-stories.txt"), "document": "paragraph"}]}
        api.train_tokenizer(
            common(folder) | {"data": book, "tokenizer": {"train": {"vocab_size": 2000}}}, out=tokenizer
        )
    sources = [
        {"path": str(data / "dirty/html_pages.jsonl"), "field": "html"},
        {"path": str(data / "dirty/*_raw.txt"), "document": "line"},
        {"path": str(folder / "c4_train.jsonl")},
    ]
    validation = [{"path": str(folder / "held_out.jsonl")}]
    own = {"train": sources, "validation": validation, "steps": steps, "max_length": 128}
    return common(folder) | {
        "data": own,
        "tokenizer": {"path": str(tokenizer)},
        "train": {"max_steps": updates, "seed": seed, "precision": "fp32"},
        "eval": {"every": updates},
        "run_dir": str(folder / f"{kind}-{seed}"),
    }


def common(folder: Path) -> dict[str, Any]:
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4}
    return {
        "task": "clm",
        "model": {"config": {"model_type": "llama", **sizes, "max_position_embeddings": 128}},
        "batch": {"global_size": 16, "micro_size": 16},
        "optim": {"lr": 3e-3, "warmup": 0.05},
        "train": {"max_steps": 1, "precision": "fp32"},
        "log": {"report": False},
        "run_dir": str(folder / "run"),
    }


if __name__ == "__main__":
    main()
