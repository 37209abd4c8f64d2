"""Every kind of task on real data, from scratch with a small model: the score beside a baseline that learns nothing.

    PTFT_TEST_DATA=... python benchmarks/tasks.py [CASE ...] [--threads 2]

Each case is one run of `ptft train` on a recipe that this script writes. The baseline is computed here from the rows
themselves: the commonest label, the mean, no entity at all, a copy of the source, or the frequencies of tokens.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn import metrics

BERT = {
    "model_type": "bert",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
T5 = {
    "model_type": "t5",
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 256,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.1,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
WORDPIECE = {"train": {"algorithm": "wordpiece", "vocab_size": 6000}}
BPE = {"train": {"algorithm": "bpe", "vocab_size": 4096}}


@dataclass(frozen=True)
class Case:
    """train, validation: files below the data folder; score: the metric that is shown; baseline: (train, validation,
    recipe, run directory) -> what can be had without learning."""

    task: str
    train: str
    validation: str | float
    score: str
    baseline: Callable[[Path, Path, Path], float]
    epochs: float
    settings: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, str] = field(default_factory=dict)
    max_length: int = 64
    lr: float = 1e-3
    goal: str = "max"
    dropout: float = 0.1


# --- baselines --------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".tsv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def majority(train: Path, validation: Path, _run: Path) -> float:
    (commonest, _), *_ = Counter(row["label"] for row in read(train)).most_common()
    gold = [row["label"] for row in read(validation)]
    return float(metrics.accuracy_score(gold, [commonest] * len(gold)))


def nothing(_train: Path, _validation: Path, _run: Path) -> float:
    """The correlation with a constant, and the F1 of an annotator who marks nothing."""
    return 0.0


def copy_chrf(source: str, target: str) -> Callable[[Path, Path, Path], float]:
    def baseline(_train: Path, validation: Path, _run: Path) -> float:
        rows = read(validation)
        return float(sacrebleu.corpus_chrf([row[source] for row in rows], [[row[target] for row in rows]]).score)

    return baseline


def lead_rouge(_train: Path, validation: Path, _run: Path) -> float:
    """ROUGE-1 of the dialogue's first turn as its summary."""
    scorer = RougeScorer(["rouge1"])
    scores = [
        scorer.score(row["summary"], row["dialogue"].split("\n")[0])["rouge1"].fmeasure for row in read(validation)
    ]
    return float(np.mean(scores))


def token_frequencies(_train: Path, _validation: Path, run: Path) -> float:
    """The perplexity of learned tokens, each predicted by its frequency in the training answers (one added to each)."""
    from ptft_dist.api import load_recipe
    from ptft_dist.data.prepare import prepare
    from ptft_dist.tasks.registry import encoder_class

    loaded = load_recipe(str(run.parent / "recipe.yaml"))
    prepared = prepare(loaded.recipe, loaded.base, encoder_class(loaded.recipe.task))
    assert prepared.validation is not None
    counts = np.ones(prepared.report.vocabulary)
    for store, learn in ((prepared.train, True), (prepared.validation, False)):
        rows = [store.row(i) for i in range(len(store))]
        learned = np.concatenate([row.input_ids[row.columns["learned"] == 1] for row in rows])
        if learn:
            np.add.at(counts, learned, 1)
    return math.exp(float(-np.log(counts[learned] / counts.sum()).mean()))


# --- cases ------------------------------------------------------------------------------------------------------------

GENERATION = {"max_new_tokens": 32, "metrics": ["bleu", "chrf", "rouge"]}
SFT = {"task": "sft", "score": "perplexity", "baseline": token_frequencies, "goal": "min", "lr": 3e-3, "dropout": 0.0}
CASES: dict[str, Case] = {
    "SST-2": Case("classification", "cls/sst2/train.tsv", "cls/sst2/dev.tsv", "accuracy", majority, 2),
    "THUCNews": Case(
        "classification", "cls/thucnews_zh/train.tsv", "cls/thucnews_zh/dev.tsv", "accuracy", majority, 5, max_length=40
    ),
    "STS-B": Case(
        "regression",
        "reg/stsb_en/train.jsonl",
        "reg/stsb_en/dev.jsonl",
        "pearson",
        nothing,
        3,
        {"pair": True},
        {"text": "sentence1", "text_pair": "sentence2", "label": "score"},
        max_length=96,
    ),
    "RTE": Case(
        "classification",
        "pair/rte/train.tsv",
        "pair/rte/dev.tsv",
        "accuracy",
        majority,
        2,
        {"pair": True},
        {"text": "sentence1", "text_pair": "sentence2"},
        max_length=128,
        lr=3e-4,
    ),
    "WNUT-17": Case("token_classification", "ner/wnut17/train.conll", "ner/wnut17/dev.conll", "f1_micro", nothing, 6),
    "Weibo NER": Case(
        "token_classification",
        "ner/weibo_zh/train.conll",
        "ner/weibo_zh/dev.conll",
        "f1_micro",
        nothing,
        8,
        max_length=128,
    ),
    "Multi30k en-de": Case(
        "seq2seq",
        "seq2seq/multi30k_en_de/train.jsonl",
        "seq2seq/multi30k_en_de/val.jsonl",
        "chrf",
        copy_chrf("en", "de"),
        8,
        {"generation": GENERATION, "max_target_length": 48},
        {"source": "en", "target": "de"},
        lr=2e-3,
    ),
    "DialogSum": Case(
        "seq2seq",
        "seq2seq/dialogsum/train.jsonl",
        "seq2seq/dialogsum/test.jsonl",
        "rouge1",
        lead_rouge,
        15,
        {"generation": GENERATION, "max_target_length": 64},
        {"source": "dialogue", "target": "summary"},
        max_length=256,
        lr=2e-3,
    ),
    "Alpaca en": Case(train="sft/alpaca_en.jsonl", validation=0.05, epochs=1, max_length=256, **SFT),  # type: ignore[arg-type]
    "Alpaca zh": Case(train="sft/alpaca_zh.jsonl", validation=0.05, epochs=2, max_length=256, **SFT),  # type: ignore[arg-type]
    "SGD turns en": Case(train="sft/sgd_multiturn_en.jsonl", validation=0.1, epochs=3, max_length=384, **SFT),  # type: ignore[arg-type]
    "CrossWOZ turns zh": Case(train="sft/crosswoz_multiturn_zh.jsonl", validation=0.1, epochs=3, max_length=384, **SFT),  # type: ignore[arg-type]
    "Tool calls en": Case(train="sft/toolcall_multiturn_en.jsonl", validation=0.1, epochs=3, max_length=512, **SFT),  # type: ignore[arg-type]
}


def write_recipe(case: Case, data: Path, folder: Path) -> Path:
    config = dict({"seq2seq": T5, "sft": LLAMA}.get(case.task, BERT))
    chinese = "_zh" in case.train
    source = {"fields": case.fields} if case.fields else {}
    validation = (
        case.validation if isinstance(case.validation, float) else [{"path": str(data / case.validation), **source}]
    )
    recipe: dict[str, Any] = {
        "task": case.task,
        "model": {"config": config},
        "tokenizer": WORDPIECE if config is not None and case.task not in ("seq2seq", "sft") else BPE,
        "data": {
            "train": [{"path": str(data / case.train), **source}],
            "validation": validation,
            "max_length": case.max_length,
            "bad_rows": "skip",
            "cache_dir": str(folder.parent / "cache"),
        },
        "batch": {"global_size": 32 if case.task != "sft" else 16, "micro_tokens": 4096},
        "optim": {"lr": case.lr, "warmup": 0.1, "weight_decay": 0.01, "schedule": "linear"},
        "train": {"epochs": case.epochs, "precision": "fp32"},
        "eval": {"metric": case.score, "goal": case.goal},
        "save": {"keep": 1},
        "log": {"tensorboard": False},
        "run_dir": str(folder / "run"),
    }
    if case.settings:
        recipe[case.task] = case.settings
    if chinese and case.task == "seq2seq":
        recipe[case.task]["generation"]["bleu_tokenize"] = "zh"
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return path


def run_case(name: str, data: Path, folder: Path, threads: int) -> str:
    case = CASES[name]
    folder.mkdir()
    recipe = write_recipe(case, data, folder)
    started = time.perf_counter()
    command = [sys.executable, "-m", "ptft_dist", "train", str(recipe)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed with exit code {done.returncode}:\n{done.stderr}")
    seconds = time.perf_counter() - started
    result = json.loads((folder / "run/result.json").read_text())
    score = result["metrics"][f"eval/{case.score}"]
    validation = data / case.validation if isinstance(case.validation, str) else data / case.train
    baseline = case.baseline(data / case.train, validation, folder / "run")
    better = score > baseline if case.goal == "max" else score < baseline
    return (
        f"| {name} | {case.task} | {case.score} | {score:.3f} | {baseline:.3f} | {'yes' if better else 'NO'} | "
        f"{result['steps']} | {seconds:.0f} s |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[[], *CASES], help="all, when none is named")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    data = Path(os.environ.get("PTFT_TEST_DATA") or parser.error("PTFT_TEST_DATA does not name the data folder"))
    print("| data | task | score | ours | baseline | better | updates | time |\n|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for i, name in enumerate(options.cases or CASES):
            print(run_case(name, data, Path(folder) / str(i), options.threads), flush=True)


if __name__ == "__main__":
    main()
