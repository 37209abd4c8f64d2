"""A resumed run uses the values of its recipe for what `--accept` lets change, on every backend."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import Start, start, train_rows
from tiny import write_tiny

KINDS = {"single": (1, "cpu"), "zero2": (2, "cpu_zero2"), "zero3": (2, "cpu_zero3")}
KINDS |= {"fsdp2": (2, "fsdp2")}
Resumed = Callable[..., tuple[Start, Path]]


@pytest.fixture(scope="module", params=KINDS)
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Resumed:
    """A function that resumes a run of two updates for four more with changed keys."""
    ranks, kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    optim = {"lr": 1e-3, "schedule": "constant", "warmup": 0, "weight_decay": 0.1, "max_grad_norm": 1.0}
    write_tiny(folder, "clm", layers=1, optim=optim, train={"max_steps": 2}, save={"every": 2}, eval={"every": None})

    words = ["train", "recipe.yaml"]
    first = start(*words, "run_dir=first", cwd=folder, cache=cache, ranks=ranks, kind=kind)
    assert first.wait() == 0, first.stderr

    def resume(run_dir: str, *changed: str) -> tuple[Start, Path]:
        shutil.copytree(folder / "first", folder / run_dir)
        changed = ("train.max_steps=6", *changed)
        accept = [word for each in changed for word in ("--accept", each.partition("=")[0])]
        more = (f"run_dir={run_dir}", *changed, *accept)
        return start(*words, *more, cwd=folder, cache=cache, ranks=ranks, kind=kind), folder / run_dir

    return resume


def matrix(run_dir: Path) -> torch.Tensor:
    return load_file(run_dir / "model/model.safetensors")["model.layers.0.mlp.up_proj.weight"]


def test_weight_decay(resumed: Resumed) -> None:
    """A decoupled decay of 50 takes 5 % of a matrix in each of four updates; AdamW's own updates are small."""
    (first, plain), (second, decayed) = resumed("plain"), resumed("decayed", "optim.weight_decay=50")
    assert first.wait() == 0, first.stderr
    assert second.wait() == 0, second.stderr
    assert (matrix(decayed).norm() / matrix(plain).norm()).item() == pytest.approx(0.95**4, abs=0.02)


def test_clipping(resumed: Resumed) -> None:
    """Without a memory of earlier gradients, AdamW hardly moves a weight by gradients far below its eps of 1e-8."""
    run, run_dir = resumed("clipped", "optim.max_grad_norm=1e-12", "optim.betas=[0.0,0.5]", "optim.eps=1e-8")
    before = matrix(run_dir)
    assert run.wait() == 0, run.stderr
    assert 0 < (matrix(run_dir) - before).abs().max() < 1e-4  # the decay; lr is 1e-3


def test_other_groups_are_refused(resumed: Resumed) -> None:
    run, run_dir = resumed("groups", "optim.weight_decay=0")
    assert run.wait() == 4, run.stderr
    numbers = re.search(
        r"for parameter groups of \[(\d+), (\d+)\] parameters, but this .* groups of \[(\d+)\]", run.stderr
    )
    assert numbers is not None, run.stderr
    assert int(numbers[1]) + int(numbers[2]) == int(numbers[3])
    assert len(train_rows(run_dir)) == 2


def test_another_optimizer_is_refused(resumed: Resumed) -> None:
    run, run_dir = resumed("sgd", "optim.name=sgd", "optim.weight_decay=0")
    assert run.wait() == 4, run.stderr
    assert "has the state of another optimizer: optim.name: 'adamw' in the checkpoint, 'sgd' now" in run.stderr
    assert len(train_rows(run_dir)) == 2
