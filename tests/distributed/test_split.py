"""P1: the losses and gradient norms do not depend on the split of the updates over ranks and micro-batches."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from preloaded_ranks import forked_ptft
from support import eval_rows, start, train_rows, write_documents, write_recipe

SINGLE = {
    "accumulation of 4": {"micro_size": 3},
    "accumulation of 12": {"micro_size": 1},
    "not grouped by length": {"micro_size": 3, "group_by_length": False},
    "micro-batches by tokens": {"micro_size": None, "micro_tokens": 150},
}
KINDS = {"cpu": "ddp", "cpu_zero1": "zero1", "cpu_zero2": "zero2", "cpu_zero3": "zero3", "fsdp2": "fsdp2"}
WRAPPERS = {
    "cpu": ("DistributedDataParallel", "AdamW"),
    "cpu_zero1": ("DeepSpeedEngine", "DeepSpeedZeroOptimizer"),
    "cpu_zero2": ("DeepSpeedEngine", "DeepSpeedZeroOptimizer"),
    "cpu_zero3": ("DeepSpeedEngine", "DeepSpeedZeroOptimizer_Stage3"),
    "fsdp2": ("FSDPLossModule", "AdamW"),
}


def same_curves(run_dir: Path, reference: Path) -> None:
    ours, theirs = train_rows(run_dir), train_rows(reference)
    assert [row["step"] for row in ours] == [row["step"] for row in theirs]
    for row, expected in zip(ours, theirs, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5), row
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), row
        for exact in ("lr", "tokens", "loss_tokens"):
            assert row[exact] == expected[exact]
    assert len(eval_rows(run_dir)) == len(eval_rows(reference))
    for row, expected in zip(eval_rows(run_dir), eval_rows(reference), strict=True):
        assert row["step"] == expected["step"]
        assert row["eval/loss"] == pytest.approx(expected["eval/loss"], rel=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, documents: Path, cache: Path) -> Path:
    """A recipe of 12 updates, and its run by one process without accumulation in `whole`."""
    folder = tmp_path_factory.mktemp("split")
    changes: dict[str, Any] = {
        "train": {"max_steps": 12},
        "eval": {"every": 4, "micro_size": None},  # as batch.micro_size, or batch.micro_tokens
        "save": {"every": None},
    }
    write_recipe(folder, documents, **changes, optim={"warmup": 3})
    one = start("train", "recipe.yaml", "run_dir=whole", "batch.micro_size=12", cwd=folder, cache=cache)
    assert one.wait() == 0, one.stderr
    first = train_rows(folder / "whole")
    assert len(first) == 12
    assert sum(row["grad_norm"] > 0.4 for row in first) > 6  # clipping does something
    assert len({row["loss_tokens"] for row in first}) > 6  # and rows are ragged
    return folder


@pytest.mark.parametrize("batch", SINGLE)
def test_one_process_split_otherwise(folder: Path, cache: Path, batch: str) -> None:
    run_dir = folder / batch
    overrides = [f"batch.{key}={json.dumps(value)}" for key, value in SINGLE[batch].items()]
    run = start("train", "recipe.yaml", f"run_dir={run_dir}", *overrides, cwd=folder, cache=cache)
    assert run.wait() == 0, run.stderr
    same_curves(run_dir, folder / "whole")


def require_two(run_dir: Path, kind: str) -> None:
    environment = json.loads((run_dir / "environment.json").read_text())
    assert (environment["kind"], environment["world_size"]) == (KINDS[kind], 2)


def test_two_processes_by_the_command_line(folder: Path, cache: Path) -> None:
    """With the shipped config of ZeRO stage 3, for which `start` has one of its own."""
    words = ["train", "recipe.yaml", "run_dir=cpu_zero3", "--launch", "cpu_zero3", "--processes", "2"]
    run = forked_ptft(*words, cwd=folder, env={"PTFT_CACHE": str(cache)})
    assert run.returncode == 0, run.stderr
    require_two(folder / "cpu_zero3", "cpu_zero3")
    same_curves(folder / "cpu_zero3", folder / "whole")


# --- against a loop that knows nothing of batches ---------------------------------------------------------------------

DOCUMENTS, EPOCHS, GLOBAL_SIZE = 17, 5, 12  # 85 rows: seven updates of 12, and a last one of a single row
STEPS, WARMUP, PEAK_LR, MAX_NORM = 8, 3, 0.01, 0.4


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with 17 documents of 2 to 20 words, one per row."""
    folder = tmp_path_factory.mktemp("small")
    lines = write_documents(folder / "all.txt", count=DOCUMENTS).read_text().splitlines()
    short = [" ".join(line.split()[: 2 + i % 19]) for i, line in enumerate(lines)]
    (folder / "text.txt").write_text("\n".join(short) + "\n")
    changes: dict[str, Any] = {
        "data": {"validation": [{"path": "text.txt", "document": "line"}], "max_length": 128},
        "model": {"config": {"num_hidden_layers": 2, "max_position_embeddings": 128}},
        "train": {"max_steps": None, "epochs": EPOCHS},
        "eval": {"micro_size": None},
        "save": {"every": None},
    }
    write_recipe(folder, folder / "text.txt", **changes)
    return folder


@pytest.fixture(scope="module")
def naive(small: Path, cache: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of each update, row by row without padding; and the final loss over all rows."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from ptft_dist.data.order import rows_at

    run = start("train", "recipe.yaml", "run_dir=one", cwd=small, cache=cache)
    assert run.wait() == 0, run.stderr
    tokenizer = AutoTokenizer.from_pretrained(small / "one/model")
    lines = (small / "text.txt").read_text().splitlines()
    tokens = [[*tokenizer.encode(line, add_special_tokens=False), tokenizer.eos_token_id] for line in lines]
    assert len({len(row) for row in tokens}) > 8
    assert max(map(len, tokens)) <= 128

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(small / "one/model")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)

    def loss_sum(row: list[int]) -> torch.Tensor:
        ids = torch.tensor([row])
        return F.cross_entropy(model(input_ids=ids[:, :-1]).logits[0], ids[0, 1:], reduction="sum")

    curves: dict[str, list[float]] = {name: [] for name in ("loss", "grad_norm", "lr", "loss_tokens", "tokens")}
    for step in range(STEPS):
        rows = [tokens[i] for i in rows_at(step * GLOBAL_SIZE, min(85, (step + 1) * GLOBAL_SIZE), DOCUMENTS, seed=0)]
        count = sum(len(row) - 1 for row in rows)
        loss = sum((loss_sum(row) for row in rows), torch.zeros(())) / count
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients))
        for gradient in gradients:
            gradient.mul_(min(1.0, MAX_NORM / norm))
        done = (step - WARMUP) / (STEPS - WARMUP)
        lr = PEAK_LR * ((step + 1) / WARMUP if step < WARMUP else 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        for name, value in zip(curves, (loss.item(), norm, lr, count, count + len(rows)), strict=True):
            curves[name].append(value)
    with torch.no_grad():
        curves["eval"] = [float(sum(loss_sum(row) for row in tokens)) / sum(len(row) - 1 for row in tokens)]
    return curves


def follows(run_dir: Path, naive: dict[str, list[float]]) -> None:
    measured = train_rows(run_dir)
    assert len(measured) == STEPS
    assert [row["lr"] for row in measured] == pytest.approx(naive["lr"], rel=1e-9)
    assert [row["loss_tokens"] for row in measured] == naive["loss_tokens"]
    assert [row["tokens"] for row in measured] == list(itertools.accumulate(naive["tokens"]))
    assert [row["loss"] for row in measured] == pytest.approx(naive["loss"], rel=1e-5)
    assert [row["grad_norm"] for row in measured] == pytest.approx(naive["grad_norm"], rel=1e-4)
    assert eval_rows(run_dir)[-1]["eval/loss"] == pytest.approx(naive["eval"][0], rel=1e-5)


def test_one_process_equals_a_naive_loop(small: Path, naive: dict[str, list[float]]) -> None:
    follows(small / "one", naive)


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_it_too(small: Path, cache: Path, naive: dict[str, list[float]], kind: str) -> None:
    """The last update has one row for two ranks. Each rank reports its engine's backend."""
    patch = ["witness"]
    run = start("train", "recipe.yaml", f"run_dir={kind}", cwd=small, cache=cache, ranks=2, kind=kind, patches=patch)
    assert run.wait() == 0, run.stderr
    follows(small / kind, naive)
    require_two(small / kind, kind)
    for rank in range(2):
        seen = json.loads((small / f"witness-{rank}.json").read_text())
        assert (seen["module"], seen["optimizer"]) == WRAPPERS[kind]
        assert seen["world_size"] == 2
        share = seen["own_elements"] / seen["all_elements"]
        assert share == 1 if kind == "cpu" else 0.4 < share < 0.6


def test_a_fused_head_whose_module_never_runs_is_gathered_under_fsdp2(
    small: Path, cache: Path, naive: dict[str, list[float]]
) -> None:
    """The fused loss reads the head's weight without its forward; FSDP2 must gather it together with the final norm."""
    words = ["run_dir=fused", "clm.head=fused", "eval.every=2"]
    run = start("train", "recipe.yaml", *words, cwd=small, cache=cache, ranks=2, kind="fsdp2_efficient")
    assert run.wait() == 0, run.stderr
    follows(small / "fused", naive)


def test_a_rank_without_rows_among_micro_batches_by_tokens(
    small: Path, cache: Path, naive: dict[str, list[float]]
) -> None:
    by_tokens = ["batch.micro_size=null", "batch.micro_tokens=130"]
    run = start("train", "recipe.yaml", "run_dir=by_tokens", *by_tokens, cwd=small, cache=cache, ranks=2)
    assert run.wait() == 0, run.stderr
    follows(small / "by_tokens", naive)
