"""PPO beside the PPOTrainer of TRL 1.12.0: samples per second and peak memory, all weights trained and with LoRA.

    python benchmarks/ppo.py --trl /path/to/trl112/bin/python [--repeats 3] [--hidden-size 256 --layers 4] [--lora 8]

Both train the same networks on the same prompts, response lengths, minibatches and epochs, in turns, each in a process
of its own. ppo_trl.py is TRL's side, and says what an update is; the head of tests/recorded/make_ppo_reference.py says
how to make its environment. Two things differ because TRL has no choice: its value network is a network of its own,
where ours is a head on the policy, and with LoRA its reward model is a network of its own, where ours is a second
adapter on the policy's base.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def recipe(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    networks, lora = options.networks, {"r": options.lora, "alpha": 2 * options.lora, "targets": LORA_TARGETS}
    return {
        "task": "ppo",
        "model": {"path": str(networks / "policy"), "adapt": {"lora": lora} if options.lora else "full"},
        "data": {
            "train": [{"path": str(networks / "prompts.jsonl")}],
            "max_length": 128,
            "cache_dir": str(folder / "cache"),
        },
        "ppo": {
            "rewards": [{"model": str(networks / ("reward_adapter" if options.lora else "reward"))}],
            "prompts": options.batch,
            "epochs": options.epochs,
            "sampling": {"max_new_tokens": options.response_length, "micro_size": options.batch},
            "kl": 0.05,
            "show": 0,
        },
        "batch": {
            "global_size": options.batch // options.minibatches,
            "micro_size": options.batch // options.minibatches,
        },
        "optim": {"lr": 1e-5, "schedule": "constant", "weight_decay": 0.0},
        "train": {
            "max_steps": options.updates * options.epochs * options.minibatches,
            "seed": options.seed,
            "precision": "fp32",
        },
        "save": {"every": None},
        "log": {"tensorboard": False},
        "run_dir": str(folder / "run"),
    }


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train with ours in this process. Returns what ppo_trl.py prints."""
    import torch

    import ptft_dist

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        result = ptft_dist.train(recipe(options, Path(name)), quiet=True)
    steps = options.epochs * options.minibatches
    rows = [row for row in result.history if "loss" in row][steps:]  # without the first rollout, as for TRL
    phases = rows[::steps]
    seconds = sum(row["time_s"] for row in rows) / len(phases)
    generation, scoring = (statistics.mean(row[key] for row in phases) for key in ("generation_s", "scoring_s"))
    status = Path("/proc/self/status").read_text()
    return {
        "samples_per_second": options.batch / seconds,
        "peak_rss_bytes": next(int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith("VmHWM:")),
        "phase_seconds_per_update": {
            "generation": generation,
            "scoring": scoring,
            "update": seconds - generation - scoring,
        },
        "response_tokens": statistics.mean(row["response_tokens"] for row in phases),
    }


def run(python: str, script: str, words: list[str], threads: int) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [python, str(HERE / script), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(options: argparse.Namespace, words: list[str], lora: int) -> None:
    """Both sides in turns, and the medians over the repeats."""
    words = [*words, "--lora", str(lora)]
    sides: dict[str, list[dict[str, Any]]] = {"ptft": [], "trl": []}
    for _ in range(options.repeats):
        sides["ptft"].append(run(sys.executable, "ppo.py", ["--ours", *words], options.threads))
        sides["trl"].append(run(options.trl, "ppo_trl.py", words, options.threads))
    print(f"\n{f'LoRA of rank {lora}' if lora else 'all weights'}, medians of {options.repeats} runs")
    print(f"{'':6}{'samples/s':>12}{'peak memory':>14}{'generation':>12}{'scoring':>10}{'update':>10}  s per rollout")
    for name, runs in sides.items():
        phases = [statistics.median(each["phase_seconds_per_update"][key] for each in runs) for key in PHASES]
        speed, memory = (statistics.median(each[key] for each in runs) for key in MEASURES)
        print(f"{name:6}{speed:12.2f}{memory / 1e9:11.2f} GB{phases[0]:12.2f}{phases[1]:10.2f}{phases[2]:10.2f}")
    pairs = list(zip(sides["ptft"], sides["trl"], strict=True))
    for key in MEASURES:
        ratios = sorted(ours[key] / theirs[key] for ours, theirs in pairs)
        print(f"{key}: ptft / trl = {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


PHASES, MEASURES = ("generation", "scoring", "update"), ("samples_per_second", "peak_rss_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", help="the Python of the environment with TRL 1.12.0")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--response-length", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32, help="rollouts in an update")
    parser.add_argument("--minibatches", type=int, default=4, help="optimizer steps in an epoch")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--updates", type=int, default=4, help="rollouts; the first is not timed")
    parser.add_argument("--lora", type=int, default=8, help="rank")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--networks", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--prompts", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ours:
        print(json.dumps(train(options)))
        return
    if options.trl is None:
        parser.error("--trl is missing: the peer needs an environment of its own")
    with tempfile.TemporaryDirectory() as name:
        sizes = ["--hidden-size", str(options.hidden_size), "--layers", str(options.layers)]
        subprocess.run([sys.executable, str(HERE / "make_ppo_networks.py"), name, *sizes], check=True)
        words = ["--networks", name, "--prompts", f"{name}/prompts.jsonl"]
        for key in ("response_length", "batch", "minibatches", "epochs", "updates", "threads", "seed"):
            words += [f"--{key.replace('_', '-')}", str(getattr(options, key))]
        for lora in (0, options.lora):
            compare(options, words, lora)


if __name__ == "__main__":
    main()
