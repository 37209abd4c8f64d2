"""All that only a GPU can show: tests, equality over splits in bf16 and fp16, offloading, speed beside peers, PPO.

    python benchmarks/gpu.py --out docs             # make gpu: one card, at most 25 minutes; writes gpu.md and gpu.json
    python benchmarks/gpu.py --dry --out FOLDER     # make gpu-dry: the same at toy size on the CPU

Each run is a process of its own with a time limit. One that fails or takes too long becomes a line that says so, and
the exit code 1, and the others go on. Contenders of the speed table train the same network on rows of the same shape,
bf16 on a GPU, and take turns; the tokens of peers are random.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BUDGET_S, RUN_LIMIT_S = 25 * 60, 300
WARM_UP_UPDATES = 2


@dataclass(frozen=True)
class Size:
    """A network and its batch."""

    config: dict[str, Any]
    vocab: int
    length: int
    micro: int
    rows: int
    """Rows of an update."""
    updates: int


def llama(hidden: int, inner: int, layers: int, heads: int, length: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": length,
    }


SIZES = {
    "125M": Size(llama(768, 2048, 12, 12, 1024), 32_000, 1024, 16, 64, 12),
    "1B": Size(llama(2048, 5504, 20, 16, 2048), 32_000, 2048, 4, 16, 8),
}
TOY = {"toy": Size(llama(32, 64, 2, 2, 64), 512, 64, 4, 8, 4)}
VARIANTS: dict[str, dict[str, Any]] = {
    "logits": {"clm": {"head": "logits"}},
    "fused head": {"clm": {"head": "fused"}},
    "fused head, compiled": {"clm": {"head": "fused"}, "model": {"compile": True}},
    "fused head, checkpointing": {"clm": {"head": "fused"}, "model": {"gradient_checkpointing": True}},
    "isolated documents, FlashAttention": {
        "clm": {"head": "fused", "attention": "isolated"},
        "model": {"attention": "flash_attention_2"},
    },
}
PEERS = ("bare loop", "transformers.Trainer", "TRL SFTTrainer")


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    folder: Path
    dry: bool
    sizes: dict[str, Size]
    ended: float
    """When the budget is used up, by time.monotonic."""
    python: str = sys.executable
    """What runs `ptft` and its peers."""

    def start(self, words: list[str], name: str) -> str | None:
        """Run a command; None, or why it failed."""
        left = min(RUN_LIMIT_S, self.ended - time.monotonic())
        if left < 20:
            return "not run: the time is used up"
        with (self.folder / f"{name}.log").open("w") as log:
            try:
                code = subprocess.run(
                    words,
                    cwd=self.folder,
                    env={**os.environ, "PTFT_CACHE": str(self.folder / "cache")},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=left,
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                return f"not finished within {left:.0f} s"
        said = [line for line in (self.folder / f"{name}.log").read_text().splitlines() if line.strip()]
        reason = next((line for line in said if "rror" in line), said[-1] if said else "no message")
        return None if code == 0 else f"exit code {code}: {reason[:200]}"

    def train(self, name: str, recipe: dict[str, Any], *words: str) -> dict[str, Any]:
        """Losses, tokens per second, MFU and peak memory of `ptft train`; or `failed`."""
        (self.folder / f"{name}.yaml").write_text(json.dumps({**recipe, "run_dir": name}))
        failed = self.start([self.python, "-m", "ptft_dist", "train", f"{name}.yaml", *words], name)
        if failed:
            return {"failed": failed}
        rows = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        steps = [row for row in rows if "loss" in row]
        timed = steps[WARM_UP_UPDATES:]
        return {
            "losses": [row["loss"] for row in steps],
            "tokens_per_s": statistics.median(row["tokens_per_s"] for row in timed),
            "mfu": statistics.median(row.get("mfu") or 0.0 for row in timed),
            "memory": max(row["memory_bytes"] for row in steps),
            "rows": steps,
        }

    def recipe(self, size: Size, **changes: Any) -> dict[str, Any]:
        plain: dict[str, Any] = {
            "task": "clm",
            "model": {"config": size.config},
            "tokenizer": {"train": {"vocab_size": size.vocab, "max_megabytes": 0.5 if self.dry else 20}},
            "data": {
                "train": [{"source": "python-stdlib", "limit": 60 if self.dry else None}],
                "max_length": size.length,
            },
            "clm": {"attention": "across"},
            "batch": {"global_size": size.rows, "micro_size": size.micro},
            "optim": {"lr": 3e-4},
            "train": {"max_steps": size.updates, "precision": "fp32" if self.dry else "bf16"},
            "log": {"tensorboard": False},
        }
        return merged(plain, changes)


def merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(a[key], value) if isinstance(a.get(key), dict) else value for key, value in b.items()}
    return {**a, **both}


# --- the parts --------------------------------------------------------------------------------------------------------


def tests(bench: Bench) -> Iterator[dict[str, Any]]:
    """The tests that need a card."""
    words = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", str(ROOT / "tests/test_gpu.py")]
    failed = bench.start(words, "pytest")
    said = (bench.folder / "pytest.log").read_text().strip().splitlines() if not failed else []
    yield {"what": "pytest -m gpu", **({"failed": failed} if failed else {"result": said[-1].strip("= ")})}


def splits(bench: Bench) -> Iterator[dict[str, Any]]:
    """The same update in fewer or more micro-batches, in one process and under ZeRO-2, in each precision."""
    size = next(iter(bench.sizes.values()))
    for precision in ("fp32",) if bench.dry else ("fp32", "bf16", "fp16"):
        whole = bench.train(f"whole-{precision}", bench.recipe(size, train={"precision": precision}))
        zero = "cpu_zero2" if bench.dry else "zero2"
        split = {"batch": {"micro_size": size.micro // 4}, "train": {"precision": precision}}
        others = {
            f"micro_size {size.micro // 4}": bench.train(f"split-{precision}", bench.recipe(size, **split)),
            "ZeRO-2": bench.train(
                f"zero2-{precision}",
                bench.recipe(size, train={"precision": precision}),
                *("--launch", zero, "--processes", "1"),
            ),
        }
        for name, other in others.items():
            what = f"{precision}: micro_size {size.micro} and {name}"
            failed = whole.get("failed") or other.get("failed")
            if failed:
                yield {"what": what, "failed": failed}
                continue
            apart = max(abs(a / b - 1) for a, b in zip(other["losses"], whole["losses"], strict=True))
            yield {"what": what, "result": f"losses differ by at most {apart:.1e}", "apart": apart}


def offload(bench: Bench) -> Iterator[dict[str, Any]]:
    """Optimizer and weights in the host's memory; and a frozen reference there."""
    size = list(bench.sizes.values())[-1]
    cases: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "one process": (bench.recipe(size), ()),
        "ZeRO-3": (bench.recipe(size), ("--launch", "cpu_zero3" if bench.dry else "zero3", "--processes", "1")),
    }
    if not bench.dry:
        cases["ZeRO-3, offloaded"] = (bench.recipe(size), ("--launch", "zero3_offload", "--processes", "1"))
    runs = {name: bench.train(name.replace(" ", "-"), recipe, *words) for name, (recipe, words) in cases.items()}
    start = bench.folder / "one-process/model"
    for away in () if bench.dry or not start.exists() else (False, True):
        recipe = merged(
            bench.recipe(size),
            {
                "task": "dpo",
                "model": {"config": None, "path": str(start)},
                "tokenizer": {"train": None, "path": str(start)},
                "data": {
                    "train": [
                        {
                            "source": "python-functions",
                            "limit": 2000,
                            "fields": {"prompt": "question", "chosen": "answer", "rejected": "other_answer"},
                        }
                    ],
                    "max_length": 256,
                },
                "dpo": {"reference": "network"},
                "train": {"offload_frozen": away},
            },
        )
        del recipe["clm"]
        name = f"DPO, reference {'offloaded' if away else 'on the card'}"
        runs[name] = bench.train(f"dpo-{away}", recipe)
    for name, run in runs.items():
        if "failed" in run:
            yield {"what": name, "failed": run["failed"]}
        else:
            text = f"loss {run['losses'][-1]:.4f}, {run['memory'] / 1e9:.2f} GB, {run['tokens_per_s']:,.0f} tokens/s"
            yield {"what": name, "result": text, "losses": run["losses"], "memory": run["memory"]}


def speed(bench: Bench) -> Iterator[dict[str, Any]]:
    """Tokens per second, MFU and memory of ours in several ways, and of peers."""
    for label, size in bench.sizes.items():
        for name, changes in VARIANTS.items():
            what = f"{label}, {name}"
            if bench.dry and name not in ("logits", "fused head"):
                continue
            if "Flash" in name and importlib.util.find_spec("flash_attn") is None:
                yield {"what": what, "result": "not run: the package flash_attn is not installed"}
                continue
            run = bench.train(f"speed-{label}-{name}".replace(" ", "-").replace(",", ""), bench.recipe(size, **changes))
            yield {"what": what, **described(run)}
        for peer in PEERS:
            out = bench.folder / f"{label}-{peer}.json".replace(" ", "-")
            words = [bench.python, str(Path(__file__).absolute()), "--contender", peer, "--out", str(out)]
            failed = bench.start([*words, "--size", label], out.stem)
            yield {
                "what": f"{label}, {peer}",
                **described({"failed": failed} if failed else json.loads(out.read_text())),
            }


def described(run: dict[str, Any]) -> dict[str, Any]:
    if "failed" in run:
        return {"failed": run["failed"]}
    mfu = f", MFU {run['mfu']:.1%}" if run.get("mfu") else ""
    text = f"{run['tokens_per_s']:,.0f} tokens/s{mfu}, {run['memory'] / 1e9:.2f} GB"
    return {"result": text, **{key: run[key] for key in ("tokens_per_s", "mfu", "memory") if key in run}}


def ppo(bench: Bench) -> Iterator[dict[str, Any]]:
    """PPO of the network of `splits` with a reward function, and with LoRA, whose reference is the same base."""
    next(iter(bench.sizes.values()))
    start = bench.folder / "whole-fp32/model"
    prompts, tokens = (8, 8) if bench.dry else (64, 128)
    for name, model in (("PPO", {}), ("PPO with LoRA", {"adapt": "lora"})):
        recipe = {
            "task": "ppo",
            "model": {"path": str(start), **model},
            "data": {
                "train": [{"source": "python-functions", "limit": 200, "fields": {"prompt": "question"}}],
                "max_length": 32 if bench.dry else 256,
            },
            "ppo": {
                "rewards": [{"function": "rewards:length"}],
                "prompts": prompts,
                "too_long": "cut",
                "epochs": 2,
                "sampling": {"max_new_tokens": tokens},
            },
            "batch": {"global_size": prompts // 2, "micro_size": prompts // 2},
            "optim": {"lr": 1e-5},
            "train": {"max_steps": 8, "precision": "fp32" if bench.dry else "bf16"},
            "log": {"tensorboard": False},
        }
        (bench.folder / "rewards.py").write_text(
            "def length(completions, **_):\n    return [float(len(each)) for each in completions]\n"
        )
        run = bench.train(name.replace(" ", "-"), recipe)
        if "failed" in run:
            yield {"what": name, "failed": run["failed"]}
            continue
        rate = prompts / sum(row["time_s"] for row in run["rows"][-4:])  # the last rollout and its updates
        text = f"{rate:.1f} responses of up to {tokens} tokens per second, {run['memory'] / 1e9:.2f} GB"
        yield {"what": name, "result": text, "responses_per_s": rate, "memory": run["memory"]}


PARTS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "tests": tests,
    "splits": splits,
    "offload": offload,
    "speed": speed,
    "ppo": ppo,
}


# --- peers ------------------------------------------------------------------------------------------------------------


def contend(peer: str, size: Size, out: Path) -> None:
    """Train as a peer does, on random tokens; write tokens per second and peak memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(vocab_size=size.vocab, **size.config)).to(device)
    ids = torch.randint(10, size.vocab, (size.updates * size.rows, size.length))
    ticks: list[float] = []
    if peer == "bare loop":
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
        for step in range(size.updates):
            rows = ids[step * size.rows : (step + 1) * size.rows].to(device)
            for micro in rows.split(size.micro):
                with torch.autocast(device.type, torch.bfloat16, enabled=gpu):
                    loss = model(input_ids=micro, labels=micro, use_cache=False).loss
                (loss * micro.size(0) / size.rows).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            ticks.append(time.perf_counter())
    else:
        by_library(peer, model, ids, size, gpu, out.parent, ticks)
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ticks[WARM_UP_UPDATES - 1 :]))
    if gpu:
        memory = torch.cuda.max_memory_allocated()
    else:
        import resource

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out.write_text(json.dumps({"tokens_per_s": size.rows * size.length / seconds, "memory": memory}))


def by_library(peer: str, model: Any, ids: Any, size: Size, gpu: bool, folder: Path, ticks: list[float]) -> None:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ticks.append(time.perf_counter())

    options: dict[str, Any] = {
        "output_dir": str(folder / "peer"),
        "per_device_train_batch_size": size.micro,
        "gradient_accumulation_steps": size.rows // size.micro,
        "max_steps": size.updates,
        "learning_rate": 3e-4,
        "bf16": gpu,
        "use_cpu": not gpu,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if peer == "transformers.Trainer":
        rows = [{"input_ids": row, "labels": row} for row in ids]
        Trainer(model, TrainingArguments(**options), train_dataset=rows, callbacks=[Clock()]).train()
        return
    from tokenizers import Tokenizer, models
    from trl import SFTConfig, SFTTrainer

    vocabulary = {f"t{i}": i for i in range(size.vocab)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t1", eos_token="t2", unk_token="t0")
    config = SFTConfig(**options, max_length=size.length, gradient_checkpointing=False)
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]).train()


# --- the report -------------------------------------------------------------------------------------------------------


def machine() -> str:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    packages = ("torch", "transformers", "accelerate", "deepspeed")
    return ", ".join([device, *(f"{name} {version(name)}" for name in packages)])


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    kind = "**Toy sizes on a CPU: these numbers say nothing about a GPU.** " if report["dry"] else ""
    lines = ["# Measured on a GPU", "", f"{kind}Written by `make gpu`. {report['machine']}, {report['seconds']:.0f} s."]
    for part, rows in report["parts"].items():
        lines += ["", f"## {part}", "", str(PARTS[part].__doc__), "", "| what | result |", "|---|---|"]
        lines += [f"| {row['what']} | {row.get('result') or '**failed**: ' + row['failed']} |" for row in rows]
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--python", default=sys.executable, help="the interpreter that runs ptft and its peers")
    parser.add_argument("--contender", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        contend(options.contender, {**SIZES, **TOY}[options.size], options.out)
        return 0
    began = time.monotonic()
    report: dict[str, Any] = {"dry": options.dry, "machine": machine(), "parts": {}}
    with tempfile.TemporaryDirectory(prefix="ptft-gpu-") as name:
        bench = Bench(Path(name), options.dry, TOY if options.dry else SIZES, began + BUDGET_S, options.python)
        for part in options.parts:
            report["parts"][part] = []
            for row in PARTS[part](bench):
                print(f"{part}: {row['what']}: {row.get('result') or 'FAILED: ' + row['failed']}", flush=True)
                report["parts"][part].append(row)
    report["seconds"] = time.monotonic() - began
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu.json").write_text(json.dumps(report, indent=1))
    (options.out / "gpu.md").write_text(page(report))
    return 1 if any("failed" in row for rows in report["parts"].values() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
