"""Kill a PPO run on two processes at random moments, until it ends, and compare it with one that was never killed.

    python benchmarks/kills.py [--kills 20] [--seed 0] [--kind cpu | cpu_zero2 | cpu_zero3 | fsdp2]

Moments are drawn from the whole time between the start of the processes and the end of the run: while networks are
built, responses are generated or scored, weights are updated, and checkpoints are written. The run has an adaptive KL
coefficient, normalized rewards, a reference, and four updates on each rollout. Weights, optimizer, controllers,
metrics.jsonl, samples.jsonl and the curves in TensorBoard must be equal to the bit. About a minute on 2 cores.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support import Start, curves, last_step, outcome, start
from tiny import write_tiny

STEPS = 160


def write_recipe(folder: Path, start_model: Path | None) -> None:
    if start_model is None:
        write_tiny(folder, "sft", train={"max_steps": 2})
        return
    write_tiny(
        folder,
        "ppo",
        model={"path": str(start_model), "config": None},
        tokenizer={"path": str(start_model), "train": None},
        ppo={
            "kl": 0.1,
            "kl_target": 0.5,
            "kl_horizon": 200,
            "normalize_rewards": True,
            "prompts": 24,
            "epochs": 2,
            "show": 2,
        },
        train={"max_steps": STEPS},
        eval={"every": 12},
        save={"every": 8, "keep": 2},
    )


def run(folder: Path, kind: str) -> Start:
    return start("train", "recipe.yaml", cwd=folder, cache=folder.parent / "cache", ranks=2, kind=kind)


def finished(folder: Path, kind: str) -> tuple[dict[str, Any], float]:
    """The outcome of a run, and its seconds."""
    started, job = time.monotonic(), run(folder, kind)
    if job.wait(timeout_s=600):
        raise SystemExit(job.stderr)
    return {**outcome(folder / "run"), "curves": curves(folder / "run")}, time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="cpu")
    options = parser.parse_args()
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it names every gap that a kill has made
    chance, moments = random.Random(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        first, whole, broken = (Path(name) / each for each in ("first", "whole", "broken"))
        for folder in (first, whole, broken):
            folder.mkdir()
        write_recipe(first, None)
        finished(first, "cpu")
        for folder in (whole, broken):
            write_recipe(folder, first / "run/model")
        expected, seconds = finished(whole, options.kind)
        kills = 0
        while kills < options.kills:
            before = last_step(broken / "run")
            job, wait = run(broken, options.kind), chance.uniform(0, 2.5 * seconds / options.kills)
            deadline = time.monotonic() + wait
            while job.running and time.monotonic() < deadline:
                time.sleep(0.01)
            if not job.running:  # it ended first, so an earlier checkpoint goes on
                raise SystemExit(f"the run ended after {kills} kills; take more updates:\n{job.stderr}")
            job.kill()
            kills += 1
            partial = any((broken / "run/checkpoints").glob(".partial-*"))
            after = last_step(broken / "run")
            moments["while saving" if partial else "before an update" if after <= before else "later"] += 1
            print(f"kill {kills}: after {wait:.2f} s, update {after}", flush=True)
        found, _ = finished(broken, options.kind)
    print(f"moments: {dict(moments)}")
    different = [key for key in expected if found[key] != expected[key]]
    if different:
        raise SystemExit(f"different after {kills} kills: {', '.join(different)}")
    print(f"{options.kind}: equal to the bit after {kills} kills: {', '.join(expected)}")


if __name__ == "__main__":
    main()
