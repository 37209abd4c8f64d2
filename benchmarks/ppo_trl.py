"""Train with the PPOTrainer of TRL 1.12.0 and print one JSON line: samples per second, peak memory, time by phase.

This is the peer of our PPO. It runs in an environment of its own; the head of tests/recorded/make_ppo_reference.py says
how to make it.

    python benchmarks/make_ppo_networks.py FOLDER
    /path/to/trl112/bin/python benchmarks/ppo_trl.py --networks FOLDER --prompts FOLDER/prompts.jsonl \\
        --response-length 48 --batch 32 --minibatches 4 --epochs 2 --updates 4 [--lora 8] [--threads 1]

An update (TRL: batch) is one rollout of --batch prompts, then --epochs passes of --minibatches optimizer steps each.
fp32, AdamW, no gradient checkpointing, sampling at temperature 1, EOS ends a response. With --lora R the policy has a
LoRA of rank R on q, k, v and o, and the reference is the policy without it; the value network is trained whole, since
TRL's peft_config is for the policy only. samples_per_second leaves out the start and the first update; compare
samples_per_cpu_second where other work runs on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


class TimedTrainer(PPOTrainer):
    """Keeps the metrics of each update and the times at which its phases ended."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.generated: list[tuple[float, float]] = []
        self.scored: list[float] = []
        self.updated: list[float] = []
        self.cpu: list[float] = []
        self.metrics: list[dict[str, float]] = []

    def log(self, logs: dict[str, float], *_: Any, **__: Any) -> None:
        self.updated.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.metrics.append(dict(logs))

    @contextlib.contextmanager
    def timed(self) -> Any:
        """Time train(): generation is one call, and the first permutation of a batch comes after the scoring."""
        generate, permute = ppo_trainer.batch_generation, np.random.permutation

        def timed_generation(*arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            result = generate(*arguments, **keywords)
            self.generated.append((started, time.perf_counter()))
            return result

        def timed_permutation(size: int) -> Any:
            if len(self.scored) < len(self.generated):
                self.scored.append(time.perf_counter())
            return permute(size)

        with (
            patch.object(ppo_trainer, "batch_generation", timed_generation),
            patch.object(np.random, "permutation", timed_permutation),
        ):
            yield


def make_trainer(options: argparse.Namespace, output_dir: str) -> TimedTrainer:
    networks: Path = options.networks
    prompts = [json.loads(line)["input_ids"] for line in options.prompts.read_text().splitlines()]
    if len(prompts) < options.batch:
        raise SystemExit(f"{options.prompts} has {len(prompts)} prompts, fewer than --batch {options.batch}")
    arguments = PPOConfig(
        output_dir=output_dir,
        response_length=options.response_length,
        total_episodes=options.updates * options.batch,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=1,  # with more, TRL takes one optimizer step per epoch, not per minibatch
        num_mini_batches=options.minibatches,
        num_ppo_epochs=options.epochs,
        local_rollout_forward_batch_size=options.batch,
        temperature=1.0,
        stop_token="eos",
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        weight_decay=0.0,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        seed=options.seed,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=options.lora or 1, lora_alpha=2 * (options.lora or 1), target_modules=LORA_TARGETS
    )
    return TimedTrainer(
        arguments,
        AutoTokenizer.from_pretrained(networks / "policy"),
        AutoModelForCausalLM.from_pretrained(networks / "policy", dtype=torch.float32),
        None,  # a frozen copy of the policy; with LoRA, the policy without its adapter
        AutoModelForSequenceClassification.from_pretrained(networks / "reward", dtype=torch.float32),
        Dataset.from_dict({"input_ids": prompts}),
        AutoModelForSequenceClassification.from_pretrained(networks / "value", dtype=torch.float32),
        peft_config=lora if options.lora else None,
    )


def memory_bytes(field: str) -> int:
    """VmRSS: resident now; VmHWM: the peak of this process."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{field}:"))


def report(trainer: TimedTrainer, options: argparse.Namespace, start_bytes: int) -> dict[str, Any]:
    timed = range(1, options.updates)
    count = len(timed)
    phases = {
        "generation": sum(trainer.generated[i][1] - trainer.generated[i][0] for i in timed) / count,
        "scoring": sum(trainer.scored[i] - trainer.generated[i][1] for i in timed) / count,
        "update": sum(trainer.updated[i] - trainer.scored[i] for i in timed) / count,
    }
    elapsed = trainer.updated[-1] - trainer.updated[0]
    return {
        "trainer": f"trl {trl.__version__}",
        "samples_per_second": count * options.batch / elapsed,
        "samples_per_cpu_second": count * options.batch / (trainer.cpu[-1] - trainer.cpu[0]),
        "seconds_per_update": elapsed / count,
        "phase_seconds_per_update": phases,
        "peak_rss_bytes": memory_bytes("VmHWM"),
        "start_rss_bytes": start_bytes,
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "scores": [metrics["objective/scores"] for metrics in trainer.metrics],
        "kl": [metrics["objective/kl"] for metrics in trainer.metrics],
        "value_loss": [metrics["loss/value_avg"] for metrics in trainer.metrics],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--response-length", type=int, default=48)
    parser.add_argument("--batch", type=int, default=32, help="rollouts in an update")
    parser.add_argument("--minibatches", type=int, default=4, help="optimizer steps in an epoch")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--updates", type=int, default=4, help="at least 2: the first is not timed")
    parser.add_argument("--lora", type=int, default=0, help="rank of the policy's LoRA; 0: all parameters are trained")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.updates < 2:
        parser.error("--updates must be at least 2, since the first update is not timed")
    assert trl.__version__ == "1.12.0", f"this is TRL {trl.__version__}; see tests/recorded/make_ppo_reference.py"
    if options.threads:
        torch.set_num_threads(options.threads)
    start_bytes = memory_bytes("VmRSS")
    np.random.seed(options.seed)
    torch.manual_seed(options.seed)  # peft draws the adapter's weights before PPOTrainer seeds anything
    with contextlib.redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, folder)
        with trainer.timed():
            trainer.train()
    print(json.dumps(report(trainer, options, start_bytes)))


if __name__ == "__main__":
    main()
