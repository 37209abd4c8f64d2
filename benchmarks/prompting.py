"""Zero-shot and few-shot prompting of a causal model beside a fine-tuned encoder, on the same validation rows.

SST-2 has two labels, THUCNews ten, of Chinese headlines. The table has the accuracy of the most likely label, also with
contextual calibration, and that of the encoder, which is trained for a few updates.

    PTFT_TEST_DATA=... PTFT_TEST_MODELS=... python benchmarks/prompting.py [--rows 100] [--shots 0 1 4] [--updates 100]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import ptft_dist

TOPICS = (
    "finance",
    "realty",
    "stocks",
    "education",
    "science",
    "society",
    "politics",
    "sports",
    "game",
    "entertainment",
)
CASES: dict[str, dict[str, Any]] = {
    "sst2": {
        "folder": "cls/sst2",
        "template": "Review: {text}\nSentiment:",
        "labels": {"0": " negative", "1": " positive"},
    },
    "thucnews": {
        "folder": "cls/thucnews_zh",
        "template": "Headline: {text}\nTopic:",
        "labels": {str(i): f" {topic}" for i, topic in enumerate(TOPICS)},
    },
}


def recipe_of(case: dict[str, Any], data: Path, rows: int, folder: Path, model: Path) -> dict[str, Any]:
    """What both tasks share."""
    source = data / case["folder"]
    return {
        "model": {"path": str(model)},
        "data": {
            "train": [{"path": str(source / "train.tsv")}],
            "validation": [{"path": str(source / "dev.tsv"), "limit": rows}],
            "max_length": 512,
            "cache_dir": str(folder / "cache"),
        },
        "batch": {"global_size": 16, "micro_size": 16},
        "optim": {"lr": 5e-4, "weight_decay": 0.01, "schedule": "linear", "warmup": 0.1},
        "train": {"max_steps": 1, "precision": "fp32"},
        "eval": {"max_rows": rows},
        "log": {"tensorboard": False},
    }


def prompted(case: dict[str, Any], recipe: dict[str, Any], shots: int, folder: Path) -> tuple[float, float]:
    """The accuracy without and with calibration, from one evaluation."""
    section = {"template": case["template"], "labels": case["labels"], "shots": shots, "calibrate": "N/A"}
    out = folder / f"{shots}.json"
    result = ptft_dist.evaluate_model(
        recipe["model"]["path"],
        {**recipe, "task": "prompting", "prompting": section, "run_dir": str(folder / "none")},
        out=out,
    )
    lines = [json.loads(line) for line in (folder / f"{shots}.rows.jsonl").read_text(encoding="utf-8").splitlines()]
    right = [
        max(each["answer"]["log_likelihoods"], key=each["answer"]["log_likelihoods"].get) == each["reference"]
        for each in lines
    ]
    return sum(right) / len(right), result.metrics["eval/accuracy"]


def fine_tuned(recipe: dict[str, Any], updates: int, folder: Path) -> float:
    changes = {"train": {"max_steps": updates, "precision": "fp32"}, "run_dir": str(folder / "run")}
    recipe["data"]["max_length"] = 64
    recipe["model"]["new_head"] = True
    result = ptft_dist.train({**recipe, **changes, "task": "classification"})
    return result.metrics["eval/accuracy"]


def compared(data: Path, model: Path, rows: int, folder: Path) -> None:
    """Print the largest difference of a log-likelihood between our prompting and the backend of lm-eval, in fp32."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    case = CASES["sst2"]
    recipe = recipe_of(case, data, rows, folder, model)
    prompted(case, recipe, 0, folder)
    lines = (data / case["folder"] / "dev.tsv").read_text(encoding="utf-8").splitlines()[1 : rows + 1]
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for line in lines:
            label, text = line.split("\t", 1)
            file.write(json.dumps({"label": label, "text": text}, ensure_ascii=False) + "\n")
    task = {
        "task": "own_sst2",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(folder / "rows.jsonl")}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": case["template"].replace("{text}", "{{text}}"),
        "doc_to_choice": list(case["labels"].values()),
        "doc_to_target": "{{label | int}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "tasks").mkdir()
    (folder / "tasks/own_sst2.yaml").write_text(json.dumps(task), encoding="utf-8")

    def backend(**options: Any) -> Any:
        arguments = {"pretrained": str(model), "device": "cpu", "batch_size": 8, **options}
        manager = TaskManager(include_path=str(folder / "tasks"))
        return lm_eval.simple_evaluate("hf", model_args=arguments, tasks=["own_sst2"], task_manager=manager)

    theirs = backend(dtype="float32")
    found = [json.loads(line)["answer"] for line in (folder / "0.rows.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = sorted(theirs["samples"]["own_sst2"], key=lambda each: each["doc_id"])
    difference = max(
        abs(mine - float(other))
        for answer, sample in zip(found, samples, strict=True)
        for mine, (other, _) in zip(answer["log_likelihoods"].values(), sample["filtered_resps"], strict=True)
    )
    print(f"prompting and lm-eval, fp32, {rows} rows: log-likelihoods differ by at most {difference:.2g}")
    through = ptft_dist.evaluate_on_benchmarks(model, ["own_sst2"], include=folder / "tasks").tasks["own_sst2"]["acc"]
    alone = backend()["results"]["own_sst2"]["acc,none"]
    print(f"ptft evaluate --lm-eval: {through:.4f}; lm-eval: {alone:.4f}; lm-eval, fp32: ", end="")
    print(f"{theirs['results']['own_sst2']['acc,none']:.4f}", flush=True)
    if difference > 1e-3 or through != alone:
        raise SystemExit("they differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, "lm_eval"], default=list(CASES))
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--shots", type=int, nargs="*", default=[0, 1, 4])
    parser.add_argument("--updates", type=int, default=100)
    arguments = parser.parse_args()
    data, models = Path(os.environ["PTFT_TEST_DATA"]), Path(os.environ["PTFT_TEST_MODELS"])
    print("| rows | model | accuracy | calibrated | 95 % +- | seconds |\n|---|---|---|---|---|---|", flush=True)

    def show(name: str, model: str, plain: float, calibrated: str, started: float) -> None:
        error = 1.96 * math.sqrt(plain * (1 - plain) / arguments.rows)
        seconds = time.monotonic() - started
        print(f"| {name} | {model} | {plain:.3f} | {calibrated} | {error:.3f} | {seconds:.0f} |", flush=True)

    if "lm_eval" in arguments.cases:
        with tempfile.TemporaryDirectory() as temporary:
            compared(data, models / "smollm2-135m-instruct", arguments.rows, Path(temporary))
    for name in [name for name in arguments.cases if name != "lm_eval"]:
        case = CASES[name]
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for shots in arguments.shots:
                started = time.monotonic()
                recipe = recipe_of(case, data, arguments.rows, folder, models / "smollm2-135m-instruct")
                plain, calibrated = prompted(case, recipe, shots, folder)
                show(name, f"SmolLM2-135M, {shots} shots", plain, f"{calibrated:.3f}", started)
            started = time.monotonic()
            recipe = recipe_of(case, data, arguments.rows, folder, models / "minilm-l6")
            accuracy = fine_tuned(recipe, arguments.updates, folder)
            show(name, f"MiniLM-L6, {arguments.updates} updates", accuracy, "", started)


if __name__ == "__main__":
    main()
