"""Answers to ragged rows beside `transformers.pipeline` with its best batch size: rows per second, the same answers.

    PTFT_TEST_DATA=FOLDER PTFT_TEST_MODELS=FOLDER python benchmarks/predict.py [--threads 1] [--rows 600]

Classification and tagging: MiniLM with a head of random weights, on texts of 1 to 256 tokens (sentences of SST-2 and
paragraphs of Alpaca answers). Generation: SmolLM2 answers Alpaca questions with up to 16 tokens, greedily.
Both sides have loaded the network before the clock starts, read the same file, and take turns; the pipeline runs with
each batch size, and its best one counts.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from ptft_dist.judging import prediction
from ptft_dist.judging.target import find_target
from ptft_dist.launch.environment import place
from ptft_dist.tasks.registry import encoder_class

BATCH_SIZES = (1, 8, 32, 64)
MAX_LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cases", nargs="+", default=["classification", "tagging", "generation"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    data, models = Path(os.environ["PTFT_TEST_DATA"]), Path(os.environ["PTFT_TEST_MODELS"])
    for case in options.cases:
        with tempfile.TemporaryDirectory() as name:
            count = options.rows if case != "generation" else max(8, options.rows // 12)
            compare(case, *CASES[case](Path(name), data, models, count), options.repeats)


def texts(data: Path, count: int) -> list[str]:
    """Two thirds short sentences and one third long texts, mixed."""
    with (data / "cls/sst2/dev.tsv").open() as file:
        short = [row["text"] for row in csv.DictReader(file, delimiter="\t")]
    rows = [json.loads(line) for line in (data / "sft/alpaca_en.jsonl").read_text().splitlines()]
    long = [row["output"] for row in rows if len(row["output"]) > 300]
    return [(long if i % 3 == 2 else short)[i // 3] for i in range(count)]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


Case = tuple[Callable[[], list[Any]], Callable[[int], list[Any]]]
"""Ours, and the pipeline with a batch size; both return comparable answers."""


def classification(folder: Path, data: Path, models: Path, count: int) -> Case:
    head(AutoModelForSequenceClassification, folder, models, {0: "bad", 1: "good"})
    rows = texts(data, count)
    pipe = transformers.pipeline("text-classification", model=str(folder), device="cpu")
    ours = predictor(folder, write(folder / "rows.jsonl", [{"text": text} for text in rows]))
    cut: dict[str, Any] = {"truncation": True, "max_length": MAX_LENGTH}
    return (
        lambda: [each["label"] for each in ours()],
        lambda size: [each["label"] for each in pipe(rows, batch_size=size, **cut)],
    )


def tagging(folder: Path, data: Path, models: Path, count: int) -> Case:
    """The pipeline gets whole texts and tags tokens; ours tags words, which is more work after the network."""
    head(AutoModelForTokenClassification, folder, models, {0: "O", 1: "B-X", 2: "I-X"})
    words = [text.split()[:150] for text in texts(data, count)]
    pipe = transformers.pipeline("token-classification", model=str(folder), device="cpu", ignore_labels=[])
    ours = predictor(folder, write(folder / "rows.jsonl", [{"tokens": each} for each in words]))
    joined = [" ".join(each) for each in words]
    return lambda: [len(each["tags"]) for each in ours()], lambda size: [0 for _ in pipe(joined, batch_size=size)]


def generation(folder: Path, data: Path, models: Path, count: int) -> Case:
    model = models / "smollm2-135m-instruct"
    rows = [json.loads(line) for line in (data / "sft/alpaca_en.jsonl").read_text().splitlines()]
    chats = [
        [{"role": "user", "content": row["instruction"] + row.get("input", "") * (i % 3)}] for i, row in enumerate(rows)
    ]
    chats = chats[:count]
    recipe = {
        "task": "sft",
        "model": {"path": str(model)},
        "data": {"train": [{"path": "x"}], "validation": [{"path": "x"}], "max_length": 512},
        "sft": {"shape": "messages", "generation": {"max_new_tokens": 16, "metrics": []}},
        "batch": {"global_size": 1, "micro_tokens": 4096},
        "train": {"max_steps": 1, "precision": "fp32"},
        "run_dir": str(folder / "run"),
    }
    pipe = transformers.pipeline("text-generation", model=str(model), device="cpu", dtype=torch.float32)
    pipe.tokenizer.padding_side = "left"
    ours = predictor(model, write(folder / "rows.jsonl", [{"messages": chat} for chat in chats]), recipe)

    def theirs(size: int) -> list[str]:
        found = pipe(chats, batch_size=size, max_new_tokens=16, do_sample=False, return_full_text=False)
        return [each[0]["generated_text"].strip() for each in found]

    return lambda: [each["text"].strip() for each in ours()], theirs


CASES = {"classification": classification, "tagging": tagging, "generation": generation}


def head(auto_class: Any, folder: Path, models: Path, labels: dict[int, str]) -> None:
    """MiniLM with a new head, and its tokenizer."""
    torch.manual_seed(0)
    base = models / "minilm-l6"
    auto_class.from_pretrained(base, id2label=labels, label2id={v: k for k, v in labels.items()}).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def predictor(model: Path, file: Path, recipe: dict[str, Any] | None = None) -> Callable[[], list[dict[str, Any]]]:
    changes = [] if recipe else [f"data.max_length={MAX_LENGTH}"]
    target = find_target(model, recipe, changes, file)
    ours = prediction.Predictor(target, place(), encoder_class(target.loaded.recipe.task))
    ours.start()

    def answers() -> list[dict[str, Any]]:
        return [dict(found[i]) for chunk, found in ours.answers(file, 0) for i in range(len(chunk))]

    return answers


def compare(case: str, ours: Callable[[], list[Any]], theirs: Callable[[int], list[Any]], repeats: int) -> None:
    """Print rows per second, and the ratio by the clock and in CPU seconds, which other load affects less."""
    times: dict[Any, list[tuple[float, float]]] = {size: [] for size in ("ours", *BATCH_SIZES)}
    mine, others = ours(), theirs(8)  # warm up
    equal = sum(a == b for a, b in zip(mine, others, strict=True))
    for _ in range(repeats):
        for size in times:
            started = time.perf_counter(), time.process_time()
            ours() if size == "ours" else theirs(size)
            times[size].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    for i, clock in enumerate(("clock", "CPU")):
        medians = {size: statistics.median(pair[i] for pair in each) for size, each in times.items()}
        best = min(BATCH_SIZES, key=medians.__getitem__)
        ratios = sorted(a[i] / b[i] for a, b in zip(times[best], times["ours"], strict=True))
        rates = {size: f"{len(mine) / seconds:.1f}" for size, seconds in medians.items()}
        print(
            f"{case}, {clock}: ours {rates['ours']} rows/s, pipeline {rates[best]} (batch size {best}), ratio "
            f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}); pipeline by batch size: "
            + ", ".join(f"{size}: {rates[size]}" for size in BATCH_SIZES),
            flush=True,
        )
    if case != "tagging":
        print(f"  {equal} of {len(mine)} answers equal", flush=True)


if __name__ == "__main__":
    main()
