"""Train a tokenizer, a language model, a chat model, a reward model and a PPO policy, and print what each has learned.

    make demo
    python recipes/demo.py [--out runs/demo] [--processes 2]

All data are the Python standard library. A stage that has finished is not trained again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ptft_dist

CHATML = ["sft.template=chatml", 'tokenizer.add=["<|im_start|>", "<|im_end|>"]']
NO_SCRATCH = ["model.config=null", "tokenizer.train=null"]


def stages(out: Path) -> dict[str, list[str]]:
    """The recipes in their order, and the values that differ from what the recipe says."""
    clm, sft, reward = (out / name / "model" for name in ("clm", "sft", "reward"))
    return {
        "clm": [],
        "sft": [*NO_SCRATCH, *CHATML, *start_from(clm), "batch.micro_size=16", "train.max_steps=300"],
        "reward": [*start_from(sft), "batch.micro_size=16", "optim.lr=1e-3"],
        "ppo": [*start_from(sft), "batch.micro_size=16", f'ppo.rewards=[{{"model": "{reward}"}}]'],
    }


def start_from(model: Path) -> list[str]:
    return [f"model.path={model}", f"tokenizer.path={model}"]


def train(recipe: str, overrides: list[str], run_dir: Path, processes: int) -> None:
    command = [sys.executable, "-m", "ptft_dist", "train", recipe, *overrides, f"run_dir={run_dir}"]
    print(f"\n$ ptft {' '.join(command[3:])} --launch cpu --processes {processes}", flush=True)
    subprocess.run([*command, "--launch", "cpu", "--processes", str(processes)], check=True)


def first_and_last(run_dir: Path, metric: str) -> tuple[float, float]:
    """The metric in the first and in the last evaluation of a run."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    values = [row[f"eval/{metric}"] for row in rows if f"eval/{metric}" in row]
    return values[0], values[-1]


def perplexity_of_answers(out: Path) -> tuple[float, float]:
    """The perplexity of the validation answers before PPO and after it."""
    policy = ptft_dist.evaluate(out / "sft" / "resolved.yaml", {"sft.generation": None}, model=out / "ppo" / "model")
    return first_and_last(out / "sft", "perplexity")[1], policy["eval/perplexity"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    out, seconds = options.out.absolute(), {}
    for name, overrides in stages(out).items():
        started = time.monotonic()
        train(name, overrides, out / name, options.processes)
        seconds[name] = time.monotonic() - started
    rows = [
        ("clm", "perplexity of source code", *first_and_last(out / "clm", "perplexity")),
        ("sft", "perplexity of answers", *first_and_last(out / "sft", "perplexity")),
        ("reward", "accuracy on held-out pairs", *first_and_last(out / "reward", "accuracy")),
        ("ppo", "mean reward", *first_and_last(out / "ppo", "reward")),
        ("ppo", "KL divergence from the reference", *first_and_last(out / "ppo", "kl")),
        ("ppo", "perplexity of answers", *perplexity_of_answers(out)),
    ]
    print(f"\n{'stage':8}{'seconds':>8}  {'on validation rows':36}{'before':>8}{'after':>8}")
    for name, what, before, after in rows:
        stage = f"{name:8}{seconds.pop(name):8.0f}" if name in seconds else " " * 16
        print(f"{stage}  {what:36}{before:8.4g}{after:8.4g}")
    print(f'\nAsk the policy:  ptft generate {options.out}/ppo --prompt "What does os.path.join do?"')


if __name__ == "__main__":
    main()
