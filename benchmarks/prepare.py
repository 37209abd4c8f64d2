"""From raw jsonl to a token store: ptft beside `datasets.map`, and beside the tokenizer alone.

    PTFT_TEST_DATA=FOLDER python benchmarks/prepare.py [--cases clm sft] [--megabytes 50] [--rows 20000]

Input: paragraphs of FOLDER/text (books, Shakespeare, Wikipedia, C4) in random order, each as often as needed for the
size; rows for sft are those of FOLDER/sft/alpaca_en.jsonl with parts of such paragraphs added to both texts. A
tokenizer's memory of words so meets the vocabulary of 5 MB of text. The tokenizer is a byte-level BPE of 32,000 tokens
trained on the same text.

Ours is the whole of `prepare` with an empty cache. The peer reads the same file with `datasets`; for clm it tokenizes
in batches, adds EOS, concatenates and cuts rows (group_texts); for sft it renders and tokenizes each conversation with
`apply_chat_template` and keeps the assistant's mask. `tokenizer` is `encode_batch_fast` on texts in memory, in batches
of about 2 MB. Each runs in a process that has imported everything and forks from there, bound to as many cores
as it has processes. They take turns. CPU seconds are of all processes. Both sides must give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.fast_bpe import VARIABLE
from ptft_dist.data.prepare import prepare
from ptft_dist.data.tokenizer import load_tokenizer, text_only_backend, train_tokenizer
from ptft_dist.tasks.common.chat_template import CHATML
from ptft_dist.tasks.registry import encoder_class, recipe_class

MAX_LENGTH = 512
EOS = "<|im_end|>"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=["clm", "sft"], default=["clm", "sft"])
    parser.add_argument("--megabytes", type=float, default=50, help="of text, for clm")
    parser.add_argument("--rows", type=int, default=20_000, help="for sft")
    parser.add_argument("--without-gigatoken", action="store_true", help="ours without it too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(folder / "clm.jsonl", options.megabytes)
        write_rows(folder / "sft.jsonl", options.rows)
        save_tokenizer(folder / "tokenizer", folder)
        for case in options.cases:
            compare(case, folder, options)


def compare(case: str, folder: Path, options: argparse.Namespace) -> None:
    processes: list[int] = options.processes
    sides: dict[str, Callable[[str, Path, Path, int], Any]] = {
        "ours": ours,
        "datasets.map": mapped_documents if case == "clm" else mapped_rows,
        "tokenizer": tokenizer_alone,
    }
    if options.without_gigatoken:
        sides["ours, tokenizers only"] = ours_without_gigatoken
    warm_up(case, folder, sides)
    megabytes = (folder / f"{case}.jsonl").stat().st_size / 1e6
    times: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for repeat in range(options.repeats):
        for count in processes:
            digests = set()
            for side, work in sides.items():
                digest, wall_s, cpu_s = forked(work, case, folder, folder / f"{case}-{side}-{repeat}-{count}", count)
                times.setdefault((side, count), []).append((wall_s, cpu_s))
                digests |= {digest} - {None}
                print(f"{case} {side} x {count}: {wall_s:.1f} s, CPU {cpu_s:.1f} s", flush=True)
            assert len(digests) == 1, "the sides give different tokens"
    for count in processes:
        peer_wall, peer_cpu = zip(*times["datasets.map", count], strict=True)
        for side in sides:
            wall, cpu = zip(*times[side, count], strict=True)
            faster = sorted(theirs / own for own, theirs in zip(wall, peer_wall, strict=True))
            cheaper = statistics.median(theirs / own for own, theirs in zip(cpu, peer_cpu, strict=True))
            print(
                f"{case} x {count} {side:>22}: {megabytes / statistics.median(wall):6.1f} MB/s "
                f"({megabytes / max(wall):.1f} to {megabytes / min(wall):.1f}), "
                f"{megabytes / statistics.median(cpu):.1f} MB per CPU second; "
                f"{statistics.median(faster):.2f} times datasets.map ({faster[0]:.2f} to {faster[-1]:.2f}), "
                f"{cheaper:.2f} times by CPU seconds",
                flush=True,
            )


def forked(work: Callable[..., Any], case: str, folder: Path, cache: Path, count: int) -> tuple[Any, float, float]:
    """The result of a side, its wall seconds and its CPU seconds."""
    receive, send = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
        os.environ["RAYON_NUM_THREADS"] = str(count)
        started, before = time.perf_counter(), cpu_seconds()
        digest = work(case, folder, cache, count)
        wall_s, cpu_s = time.perf_counter() - started, cpu_seconds() - before
        send.send((digest() if digest is not None else None, wall_s, cpu_s))

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    result = receive.recv()
    process.join()
    return result


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# --- input -----------------------------------------------------------------------------------------------------------


def paragraphs() -> list[str]:
    text = Path(os.environ["PTFT_TEST_DATA"]) / "text"
    files = [*sorted((text / "en_gutenberg").glob("*.txt")), text / "en_tinyshakespeare.txt"]
    files.append(text / "en_wikitext2_valid.txt")
    found = [part.strip() for file in files for part in re.split(r"\n\s*\n", file.read_text()) if part.strip()]
    return found + [json.loads(line)["text"] for line in (text / "en_c4_demo.jsonl").open()]


def write_documents(path: Path, megabytes: float, *, numbered: bool = False) -> None:
    """numbered: a number that occurs nowhere else begins each document."""
    chance, parts, size = random.Random(0), paragraphs(), 0
    waiting: list[str] = []
    with path.open("w") as file:
        while size < megabytes * 1e6:
            if len(waiting) < 16:
                waiting += chance.sample(parts, len(parts))
            count = chance.choice((1, 2, 4, 8, 16))
            text = "\n\n".join([f"{size:x}"] * numbered + waiting[:count])
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            del waiting[:count]
            size += file.write(line)


def write_rows(path: Path, count: int) -> None:
    data = Path(os.environ["PTFT_TEST_DATA"]) / "sft/alpaca_en.jsonl"
    rows = [row for line in data.read_text().splitlines() if (row := json.loads(line))["output"].strip()]
    chance, parts = random.Random(0), paragraphs()
    with path.open("w") as file:
        for _ in range(count):
            row = chance.choice(rows)
            user = f"{row['instruction']}\n\n{row['input']}\n\n{chance.choice(parts)[:200]}"
            answer = f"{row['output']}\n\n{chance.choice(parts)[:300]}"
            messages = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def save_tokenizer(target: Path, folder: Path) -> None:
    texts = chain(
        paragraphs(), (message["content"] for row in read(folder / "sft.jsonl") for message in row["messages"])
    )
    settings = TokenizerTraining(vocab_size=32_000, max_megabytes=8)
    tokenizer = train_tokenizer(settings, texts, (f"eos={EOS}", "bos", "pad"), ("<|im_start|>",))
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(target)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


# --- the sides -------------------------------------------------------------------------------------------------------


def recipe(case: str, cache: Path) -> Recipe:
    return recipe_class().model_validate(
        {
            "task": case,
            "model": {"config": {"model_type": "llama"}},
            "tokenizer": {"path": "tokenizer"},
            "data": {"train": [{"path": f"{case}.jsonl"}], "max_length": MAX_LENGTH, "cache_dir": str(cache)},
            "batch": {"global_size": 1, "micro_size": 1},
            "train": {"max_steps": 1},
            "run_dir": "run",
        }
    )


def ours(case: str, folder: Path, cache: Path, count: int) -> Any:
    store = prepare(recipe(case, cache), folder, encoder_class(case), workers=count).train
    return lambda: digest_of([store.row(i).input_ids for i in range(len(store))])


def ours_without_gigatoken(case: str, folder: Path, cache: Path, count: int) -> Any:
    os.environ[VARIABLE] = "0"
    return ours(case, folder, cache, count)


def mapped_documents(case: str, folder: Path, cache: Path, count: int) -> Any:
    tokenizer: Any = load_tokenizer(folder / "tokenizer")

    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        encoded = tokenizer(batch["text"], return_attention_mask=False)["input_ids"]
        return {"input_ids": [[*ids, tokenizer.eos_token_id] for ids in encoded]}

    def group_texts(batch: dict[str, list[list[int]]]) -> dict[str, Any]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [ids[i : i + MAX_LENGTH] for i in range(0, len(ids), MAX_LENGTH)]}

    options: dict[str, Any] = {"batched": True, "num_proc": count if count > 1 else None}
    rows: Any = datasets.Dataset.from_json(str(folder / f"{case}.jsonl"), cache_dir=str(cache))
    rows = rows.map(tokenize, remove_columns=["text"], **options).map(group_texts, **options)
    return lambda: digest_of(rows["input_ids"])


def mapped_rows(case: str, folder: Path, cache: Path, count: int) -> Any:
    tokenizer: Any = load_tokenizer(folder / "tokenizer")

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True, truncation=True, max_length=MAX_LENGTH
        )
        return {"input_ids": found["input_ids"], "learned": found["assistant_masks"]}

    rows: Any = datasets.Dataset.from_json(str(folder / f"{case}.jsonl"), cache_dir=str(cache))
    rows = rows.map(encode, remove_columns=["messages"], num_proc=count if count > 1 else None)
    return lambda: digest_of(rows["input_ids"])


def tokenizer_alone(case: str, folder: Path, cache: Path, count: int) -> Any:  # noqa: ARG001
    if case == "clm":
        texts = [row["text"] for row in read(folder / "clm.jsonl")]
    else:
        texts = ["\n".join(message["content"] for message in row["messages"]) for row in read(folder / "sft.jsonl")]
    backend = text_only_backend(load_tokenizer(folder / "tokenizer"))
    for start in range(0, len(texts), 1000):
        backend.encode_batch_fast(texts[start : start + 1000], add_special_tokens=False)


def digest_of(rows: Any) -> int:
    """A hash of all tokens in order."""
    return hash(np.concatenate([np.asarray(row, np.uint32) for row in rows]).tobytes())


def warm_up(case: str, folder: Path, sides: dict[str, Callable[..., Any]]) -> None:
    """Import and open everything once, on a few rows."""
    lines = (folder / f"{case}.jsonl").read_text()
    (folder / f"{case}.jsonl").write_text("".join(lines.splitlines(keepends=True)[:50]))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for side, work in sides.items():
        if side != "ours, tokenizers only":
            work(case, folder, folder / f"warm-{case}-{side}", 1)
    del os.environ["TOKENIZERS_PARALLELISM"]
    (folder / f"{case}.jsonl").write_text(lines)


if __name__ == "__main__":
    main()
