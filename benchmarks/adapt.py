"""Every way of adapting a pretrained network side by side: what is trained, what it costs, and what it reaches.

    PTFT_TEST_DATA=FOLDER PTFT_TEST_MODELS=FOLDER python benchmarks/adapt.py [--cases sst2 wnut17 alpaca trl]

sst2, wnut17: MiniLM (22M parameters) on sentiment and on entities. alpaca: SmolLM2-135M-Instruct on 200 rows. Each
method trains in a process of its own with the same rows in the same updates; the learning rates are usual ones, not
tuned. trl: the same LoRA on the same rows with TRL's SFTTrainer, 32 rows an update in micro-batches of 8. There the
losses must agree, or the script fails; the two take turns, and the ratio of their times is printed. At most 25 minutes
on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import queue
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import ptft_dist

METHODS: dict[str, tuple[Any, float]] = {
    "full": ("full", 1.0),
    "last 2 layers": ({"last_layers": 2}, 5.0),
    "bitfit": ("bitfit", 50.0),
    "lora": ({"lora": {"r": 8}}, 10.0),
    "dora": ({"lora": {"r": 8, "dora": True}}, 10.0),
    "qlora": ({"lora": {"r": 8}}, 10.0),
    "bottleneck": ({"bottleneck": {"size": 32}}, 30.0),
    "prefix tuning": ({"prefix_tuning": {"tokens": 8}}, 100.0),
    "prompt tuning": ({"prompt_tuning": {"tokens": 8}}, 200.0),
}
"""Name -> model.adapt, and the factor of the learning rate of full training."""
RATES = {"sst2": 1e-4, "wnut17": 1e-4, "alpaca": 1e-5}


def recipe(case: str, folder: Path, updates: int) -> dict[str, Any]:
    data, models = Path(os.environ["PTFT_TEST_DATA"]), Path(os.environ["PTFT_TEST_MODELS"])
    common: dict[str, Any] = {
        "optim": {"lr": RATES[case], "weight_decay": 0.01, "schedule": "linear", "warmup": 0.1},
        "train": {"max_steps": updates, "precision": "fp32"},
        "eval": {"max_rows": 300},
        "log": {"tensorboard": False},
    }
    if case == "alpaca":
        lines = [line for line in (data / "sft/alpaca_en.jsonl").read_text().splitlines() if json.loads(line)["output"]]
        (folder / "train.jsonl").write_text("\n".join(lines[:200]) + "\n")
        (folder / "validation.jsonl").write_text("\n".join(lines[200:224]) + "\n")
        sources = {"train": [{"path": "train.jsonl"}], "validation": [{"path": "validation.jsonl"}], "max_length": 128}
        batch = {"global_size": 8, "micro_size": 8}
        return {
            "task": "sft",
            "model": {"path": str(models / "smollm2-135m-instruct")},
            "data": sources,
            "sft": {"shape": "alpaca"},
            "batch": batch,
            **common,
        }
    side = {"train": "train", "validation": "dev"}
    if case == "sst2":
        task, ending = "classification", {name: data / f"cls/sst2/{file}.tsv" for name, file in side.items()}
        special: dict[str, Any] = {"classification": {}}
    else:
        task, ending = "token_classification", {name: data / f"ner/wnut17/{file}.conll" for name, file in side.items()}
        special = {"token_classification": {}, "data": {"bad_rows": "skip"}}
    sources = {name: [{"path": str(path)}] for name, path in ending.items()}
    return {
        "task": task,
        "model": {"path": str(models / "minilm-l6")},
        "data": {**sources, "max_length": 64, **special.pop("data", {})},
        **special,
        "batch": {"global_size": 16, "micro_size": 16},
        **common,
    }


SCORES = {"sst2": "eval/accuracy", "wnut17": "eval/f1_micro", "alpaca": "eval/loss"}


def train(case: str, name: str, folder: Path, updates: int, answers: Any) -> None:
    """One method in this process; the answer is a row of the table."""
    plan = recipe(case, folder, updates)
    if name == "from scratch":
        scratch = json.loads((Path(plan["model"]["path"]) / "config.json").read_text())
        kept = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        plan["tokenizer"] = {"path": plan["model"]["path"]}
        plan["model"] = {"config": {key: scratch[key] for key in kept}}
    else:
        adapt, factor = METHODS[name]
        plan["model"]["adapt"] = adapt
        plan["optim"]["lr"] *= factor
        if name == "qlora":
            plan["model"]["quantize"], plan["optim"]["name"] = "nf4", "paged_adamw_8bit"
    (folder / "recipe.json").write_text(json.dumps(plan))
    run_dir = folder / name.replace(" ", "-")
    try:
        result = ptft_dist.train(
            str(folder / "recipe.json"), {"run_dir": str(run_dir), "data.cache_dir": str(folder / "cache")}, quiet=True
        )
    except ptft_dist.errors.PtftError as error:
        answers.put({"refused": str(error)})
        return
    written = [row for row in result.history if "loss" in row]
    files = [path for path in next((run_dir / "checkpoints").iterdir()).rglob("*") if path.is_file()]
    answers.put(
        {
            "trained": trained_parameters(files),
            "checkpoint": sum(path.stat().st_size for path in files),
            "memory": json.loads((run_dir / "result.json").read_text())["peak_memory_bytes"],
            "seconds": statistics.median(row["time_s"] for row in written[2:]),
            "score": result.metrics[SCORES[case]],
        }
    )


def answer_of(process: Any, answers: Any) -> Any:
    """What a process has put into its queue, which must not wait for a process that failed."""
    while True:
        try:
            answer = answers.get(timeout=1.0)
        except queue.Empty:
            if not process.is_alive():
                raise SystemExit(f"a process ended with {process.exitcode}; see its error above") from None
            continue
        process.join()
        return answer


def trained_parameters(files: list[Path]) -> int:
    """The number of parameters in a checkpoint, which contains the trained ones only."""
    from safetensors import safe_open

    with safe_open(next(path for path in files if path.name == "model.safetensors"), "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def table(case: str, updates: int, methods: list[str]) -> None:
    print(f"\n{case}: {updates} updates; score: {SCORES[case]}", flush=True)
    print(f"{'method':<15} {'trained':>12} {'checkpoint':>12} {'memory':>9} {'s/update':>9} {'score':>8}", flush=True)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        for method in methods:
            answers = context.Queue()
            process = context.Process(target=train, args=(case, method, Path(name), updates, answers))
            process.start()
            row = answer_of(process, answers)
            if "refused" in row:
                print(f"{method:<15} refused: {row['refused'].splitlines()[0][:100]}", flush=True)
                continue
            print(
                f"{method:<15} {row['trained']:>12,} {row['checkpoint'] / 1e6:>9.1f} MB {row['memory'] / 1e9:>6.2f} GB "
                f"{row['seconds']:>9.3f} {row['score']:>8.4f}",
                flush=True,
            )


# --- beside TRL -------------------------------------------------------------------------------------------------------


def beside_trl(updates: int, repeats: int) -> None:
    """The same LoRA, rows, order and optimizer with both; they take turns."""
    context, ratios = multiprocessing.get_context("fork"), []
    with tempfile.TemporaryDirectory() as name:
        for repeat in range(repeats):
            both = {}
            for who in (ours_beside_trl, trl):
                answers = context.Queue()
                process = context.Process(target=who, args=(Path(name), updates, answers))
                process.start()
                both[who.__name__] = answer_of(process, answers)
            ours, theirs = both["ours_beside_trl"], both["trl"]
            worst = max(abs(a / b - 1) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
            ratios.append(theirs["seconds"] / ours["seconds"])
            print(
                f"trl, repeat {repeat + 1}: ours {ours['seconds']:.1f} s, TRL {theirs['seconds']:.1f} s for the same "
                f"{updates} updates (ratio {ratios[-1]:.2f}); losses differ by at most {worst:.1e}",
                flush=True,
            )
            if worst > 1e-3:
                raise SystemExit(f"the losses differ: {ours['losses']} and {theirs['losses']}")
    print(f"TRL takes {statistics.median(ratios):.2f} times as long (median of {repeats} repeats)", flush=True)


LORA = {"r": 8, "alpha": 16, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}


def ours_beside_trl(folder: Path, updates: int, answers: Any) -> None:
    plan = recipe("alpaca", folder, updates)
    plan["model"]["adapt"], plan["batch"] = {"lora": LORA}, {"global_size": 32, "micro_size": 8}
    plan["optim"] = {"lr": 1e-3, "weight_decay": 0.0, "schedule": "constant", "betas": [0.9, 0.999]}
    del plan["data"]["validation"], plan["eval"]
    (folder / "recipe.json").write_text(json.dumps(plan))
    from ptft_dist.training.batches import UpdateDataset

    taken: list[Any] = []
    plain = UpdateDataset.__getitem__

    def recorded(dataset: Any, step: int) -> Any:
        rows = [dataset.store.row(int(row)) for row in dataset.plan.rows_of(step)]
        taken.append([[row.input_ids.tolist(), row.columns["learned"].tolist()] for row in rows])
        return plain(dataset, step)

    UpdateDataset.__getitem__ = recorded  # type: ignore[method-assign]
    result = ptft_dist.train(
        str(folder / "recipe.json"),
        {"run_dir": str(folder / f"ours-{time.time()}"), "data.cache_dir": str(folder / "cache")},
        quiet=True,
    )
    (folder / "rows.json").write_text(json.dumps(taken))
    written = [row for row in result.history if "loss" in row]
    answers.put({"losses": [row["loss"] for row in written], "seconds": sum(row["time_s"] for row in written[1:])})


def trl(folder: Path, updates: int, answers: Any) -> None:
    """TRL's SFTTrainer on our rows in our order, starting from our adapter's weights (both draw them from seed 0)."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    path = Path(os.environ["PTFT_TEST_MODELS"]) / "smollm2-135m-instruct"
    rows = [row for update in json.loads((folder / "rows.json").read_text()) for row in update]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LORA["targets"])
    )
    ticks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ticks.append(time.perf_counter())

    arguments = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=updates,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta2=0.999,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        max_length=128,
        gradient_checkpointing=False,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    data = Dataset.from_list([{"input_ids": ids, "assistant_masks": mask} for ids, mask in rows])
    trainer = SFTTrainer(
        adapted,
        args=arguments,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(path),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    answers.put({"losses": losses, "seconds": ticks[-1] - ticks[0]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["sst2", "wnut17", "alpaca", "trl"])
    parser.add_argument("--methods", nargs="+", default=[*METHODS])
    parser.add_argument("--updates", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    for case in options.cases:
        if case == "trl":
            beside_trl(options.updates or 4, options.repeats)
            continue
        methods = list(options.methods) + (["from scratch"] if case != "alpaca" else [])
        table(case, options.updates or (60 if case != "alpaca" else 10), methods)


if __name__ == "__main__":
    main()
