"""Memory of `prepare` for inputs of growing size, the size of the store, and the time to open it.

    PTFT_TEST_DATA=FOLDER python benchmarks/prepare_memory.py [--megabytes 10 100 1000] [--steps]

Documents as in prepare.py, with a new number in each, so that not all words repeat. Each size runs in a
process of its own; the peak is that of the sum of the proportional set sizes (PSS) of it and its children, read
10 times a second.
--steps: with data.steps whitespace, exact_dedup and near_dedup.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from prepare import save_tokenizer, write_documents, write_rows

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.prepare import prepare
from ptft_dist.data.store import TokenStore
from ptft_dist.tasks.registry import encoder_class, recipe_class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", action="store_true")
    options = parser.parse_args()
    steps = ["whitespace", "exact_dedup", "near_dedup"] if options.steps else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "sft.jsonl", 100)
        write_documents(folder / "text.jsonl", 1)
        save_tokenizer(folder / "tokenizer", folder)
        for megabytes in options.megabytes:
            write_documents(folder / "text.jsonl", megabytes, numbered=True)
            context = multiprocessing.get_context("spawn")
            process = context.Process(target=measure, args=(folder, megabytes, steps, options.processes))
            process.start()
            process.join()


def measure(folder: Path, megabytes: float, steps: list[str], processes: int) -> None:
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            peak[0] = max(peak[0], pss_mb())

    started = time.perf_counter()
    threading.Thread(target=watch, daemon=True).start()
    store: Any = prepare(recipe(folder, megabytes, steps), folder, encoder_class("clm"), workers=processes).train
    done.set()
    wall_s = time.perf_counter() - started
    size = sum(file.stat().st_size for file in store.path.iterdir())
    started = time.perf_counter()
    TokenStore.open(store.path)
    opened_s = time.perf_counter() - started
    print(
        f"{megabytes:.0f} MB, {'with' if steps else 'without'} steps: peak {peak[0]:.0f} MB, {wall_s:.0f} s; store "
        f"{size / (2 * store.tokens):.3f} x the bytes of its {store.tokens:,} tokens, "
        f"opened in {opened_s * 1000:.1f} ms",
        flush=True,
    )


def pss_mb() -> float:
    total = 0
    own = psutil.Process()
    for process in [own, *own.children(recursive=True)]:
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            continue
        total += next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total / 1024


def recipe(folder: Path, megabytes: float, steps: list[str]) -> Recipe:
    data: dict[str, Any] = {"train": [{"path": "text.jsonl"}], "max_length": 512, "cache_dir": f"cache-{megabytes}"}
    if steps:
        data["steps"] = steps
    return recipe_class().model_validate(
        {
            "task": "clm",
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"path": str(folder / "tokenizer")},
            "data": data,
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1},
            "run_dir": "run",
        }
    )


if __name__ == "__main__":
    main()
