"""Encoding for supervised fine-tuning beside `datasets.map`: the same rows, the same tokens, on 1 and 2 processes.

    PTFT_TEST_DATA=FOLDER python benchmarks/encode.py

FOLDER/sft/alpaca_en.jsonl is repeated, with the instructions made different, up to 20,000 rows. Ours is the whole of
`prepare` from the file to the store. The peer reads the same file, renders and tokenizes each conversation with
`apply_chat_template` in `datasets.map`, and writes Arrow; both mark the assistant's tokens. They take turns, each in a
process that has imported everything and forks from there; no cache is used.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets

from ptft_dist.config.recipe import Recipe, TokenizerTraining
from ptft_dist.data.prepare import prepare
from ptft_dist.data.store import Store
from ptft_dist.data.tokenizer import load_tokenizer, train_tokenizer
from ptft_dist.tasks.common.chat_template import CHATML
from ptft_dist.tasks.registry import encoder_class, recipe_class

MAX_LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", options.rows)
        save_tokenizer(folder / "tokenizer", folder / "rows.jsonl")
        warm_up(folder)
        times: dict[tuple[str, int], list[float]] = {}
        for repeat in range(options.repeats):
            for count in options.processes:
                store, ours_s = ours(folder, folder / f"ours-{repeat}-{count}", count)
                rows, theirs_s = theirs(folder, folder / f"theirs-{repeat}-{count}", count)
                times.setdefault(("ours", count), []).append(ours_s)
                times.setdefault(("datasets.map", count), []).append(theirs_s)
                same_tokens(store, rows)
                print(f"repeat {repeat + 1}, x {count}: ours {ours_s:.2f} s, datasets.map {theirs_s:.2f} s", flush=True)
        report(times, options.rows)


def write_rows(path: Path, count: int) -> None:
    data = Path(os.environ["PTFT_TEST_DATA"]) / "sft/alpaca_en.jsonl"
    rows = [row for line in data.read_text().splitlines() if (row := json.loads(line))["output"].strip()]
    with path.open("w") as file:
        for i in range(count):
            row = rows[i % len(rows)]
            user = f"{i}. {row['instruction']}" + (f"\n\n{row['input']}" if row["input"] else "")
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]
            file.write(json.dumps({"messages": messages}) + "\n")


def save_tokenizer(target: Path, rows: Path) -> None:
    texts = (message["content"] for line in rows.open() for message in json.loads(line)["messages"])
    roles, extra = ("eos=<|im_end|>", "bos", "pad"), ("<|im_start|>",)
    tokenizer = train_tokenizer(TokenizerTraining(vocab_size=16_000, max_megabytes=2), texts, roles, extra)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(target)


def recipe(cache: Path) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": "sft",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"path": "tokenizer"},
            "data": {"train": [{"path": "rows.jsonl"}], "max_length": MAX_LENGTH, "cache_dir": str(cache)},
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1},
            "run_dir": "run",
        }
    )


def ours(folder: Path, cache: Path, processes: int) -> tuple[Store, float]:
    started = time.perf_counter()
    prepared = prepare(recipe(cache), folder, encoder_class("sft"), workers=processes)
    return prepared.train, time.perf_counter() - started


def theirs(folder: Path, cache: Path, processes: int) -> tuple[Any, float]:
    started = time.perf_counter()
    tokenizer: Any = load_tokenizer(folder / "tokenizer")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, truncation=True, max_length=MAX_LENGTH
        )
        return {"input_ids": found["input_ids"], "learned": found["assistant_masks"]}

    rows: Any = datasets.Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(cache))
    rows = rows.map(encode, remove_columns=["messages"], num_proc=processes if processes > 1 else None)
    return rows, time.perf_counter() - started


def warm_up(folder: Path) -> None:
    """Both import and open everything once, on a few rows."""
    lines = (folder / "rows.jsonl").read_text()
    (folder / "rows.jsonl").write_text("".join(lines.splitlines(keepends=True)[:50]))
    ours(folder, folder / "warm-ours", 1)
    theirs(folder, folder / "warm-theirs", 1)
    (folder / "rows.jsonl").write_text(lines)


def same_tokens(store: Store, rows: Any) -> None:
    for i in range(0, len(store), 997):
        row = store.row(i)
        assert row.input_ids.tolist() == rows[i]["input_ids"], i
        assert row.columns["learned"].tolist() == rows[i]["learned"], i


def report(times: dict[tuple[str, int], list[float]], rows: int) -> None:
    for (who, count), seconds in times.items():
        shown = ", ".join(f"{second:.2f}" for second in seconds)
        median = statistics.median(seconds)
        print(f"{who:>12} x {count}: {median:6.2f} s ({rows / median:,.0f} rows/s); all: {shown}")
    for count in sorted({count for _, count in times}):
        pairs = zip(times["ours", count], times["datasets.map", count], strict=True)
        ratios = sorted(theirs_s / ours_s for ours_s, theirs_s in pairs)
        print(
            f"x {count}: datasets.map takes {statistics.median(ratios):.2f} times as long (median of repeats; "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
