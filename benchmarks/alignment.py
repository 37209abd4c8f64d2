"""What alignment learns, on three seeds: reward, KL divergence and preference margin before and after training.

    python benchmarks/alignment.py [--seeds 3] [--folder runs/alignment]

PPO and GRPO with a rule (an answer begins with "Return", as PEP 257 wants it) and with a learned reward model, and DPO,
each from the same chat model, on questions about functions of the standard library. Figures are those of 128 validation
rows. The gain of a reward is given in standard errors of the difference of the two means. With curves in TensorBoard:
ptft tensorboard FOLDER. About 15 minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

KL_TARGET = 4.0
ROWS = 128


def begins_with_return(completions: Sequence[Any], **_columns: Any) -> list[float]:
    """The rule, in the form of TRL's reward functions."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in completions]
    return [float(text.lstrip().startswith("Return")) for text in texts]


def cases(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Name -> recipe, and the values that differ from it."""
    rule = f'[{{"function": "alignment.{begins_with_return.__name__}"}}]'
    learned = f'[{{"model": "{folder}/reward/model"}}]'
    adaptive = [f"ppo.kl_target={KL_TARGET}", "ppo.kl_horizon=200"]
    return {
        "ppo, rule": ("ppo", [f"ppo.rewards={rule}", "ppo.kl=0.1", *adaptive]),
        "ppo, reward model": ("ppo", [f"ppo.rewards={learned}", "ppo.kl=0.2", *adaptive]),
        "grpo, rule": ("grpo", [f"grpo.rewards={rule}"]),
        "grpo, reward model": ("grpo", [f"grpo.rewards={learned}", "grpo.kl=0.2"]),
        "dpo": ("dpo", []),
    }


def train(recipe: str, words: list[str], run_dir: Path) -> list[dict[str, Any]]:
    """Train in a process of its own, unless it is done. Returns the evaluations."""
    command = [sys.executable, "-m", "ptft_dist", "train", recipe, *words, f"run_dir={run_dir}"]
    script = f"import sys, runpy; sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.argv = {command[2:]!r}; "
    script += "runpy.run_module('ptft_dist', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "eval/loss" in row]


def gain(before: dict[str, Any], after: dict[str, Any]) -> float:
    """The gain of the mean reward in standard errors."""
    error = math.hypot(before["eval/reward_std"], after["eval/reward_std"]) / math.sqrt(ROWS)
    return (after["eval/reward"] - before["eval/reward"]) / error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/alignment"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time")
    options = parser.parse_args()
    folder = options.folder.absolute()
    train("sft", ["sft.generation=null"], folder / "sft")
    start = [f"model.path={folder}/sft/model", f"tokenizer.path={folder}/sft/model"]
    (*_, judge) = train("reward", start, folder / "reward")
    print(f"reward model: accuracy {judge['eval/accuracy']:.3f}", flush=True)
    print(f"{'case':20}{'seed':>5}{'reward':>18}{'gain (SE)':>11}{'KL':>7}{'largest KL':>12}{'margin':>16}")
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [
            (name, seed, pool.submit(train, recipe, [*start, *words, f"train.seed={seed}"], folder / f"{name}-{seed}"))
            for name, (recipe, words) in cases(folder).items()
            for seed in range(options.seeds)
        ]
        for name, seed, job in jobs:
            (before, *_, after), rows = job.result(), job.result()
            line = f"{name:20}{seed:5}"
            if "eval/reward" in after:
                line += f"{before['eval/reward']:9.3f}{after['eval/reward']:9.3f}{gain(before, after):11.1f}"
                line += f"{after['eval/kl']:7.2f}{max(row['eval/kl'] for row in rows):12.2f}"
            else:
                line += f"{'':48}{before['eval/margin']:8.3f}{after['eval/margin']:8.3f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
