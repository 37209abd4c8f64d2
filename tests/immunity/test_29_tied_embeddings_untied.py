"""Immunity 29: tied embeddings stay tied under every backend, when loaded, saved and resumed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from support import outcome, start, train_rows, write_recipe

# Not every kind with every head: a run takes seconds.
RUNS = [(kind, "logits") for kind in ("cpu", "cpu_zero2", "cpu_zero3", "fsdp2")] + [("fsdp2_efficient", "fused")]
TIED = {"config": {"tie_word_embeddings": True, "attention_dropout": 0.0}}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, documents: Path, cache: Path) -> Path:
    """A recipe with tied embeddings, and its run by one process in `whole`."""
    folder = tmp_path_factory.mktemp("tied")
    write_recipe(folder, documents, model=TIED)
    run = start("train", "recipe.yaml", "run_dir=whole", cwd=folder, cache=cache)
    assert run.wait() == 0, run.stderr
    return folder


def assert_same_training(run_dir: Path, reference: Path) -> None:
    ours, theirs = train_rows(run_dir), train_rows(reference)
    assert len(ours) == len(theirs) == 8
    assert [row["loss"] for row in ours] == pytest.approx([row["loss"] for row in theirs], rel=1e-5)
    assert [row["grad_norm"] for row in ours] == pytest.approx([row["grad_norm"] for row in theirs], rel=1e-4)


@pytest.mark.parametrize(("kind", "head"), RUNS)
def test_two_processes_train_the_network_of_one(folder: Path, cache: Path, kind: str, head: str) -> None:
    words = ["train", "recipe.yaml", f"run_dir={kind}-{head}", f"clm.head={head}"]
    run = start(*words, cwd=folder, cache=cache, ranks=2, kind=kind)
    assert run.wait() == 0, run.stderr
    assert_same_training(folder / f"{kind}-{head}", folder / "whole")
    stored = folder / f"{kind}-{head}/checkpoints/step-00000008/model.safetensors"
    if "zero" not in kind:
        assert_stored_once(stored)


def assert_stored_once(path: Path) -> None:
    """The file has 4 bytes for each parameter of the network, and a header."""
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        elements = sum(file.get_tensor(name).numel() for name in names)
    assert len({EMBEDDING, HEAD} & set(names)) == 1
    # 320 x 32 embedding; a layer of attention (4 x 32 x 32), MLP (3 x 32 x 64) and two norms; the last norm.
    assert elements == 320 * 32 + (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert 4 * elements < path.stat().st_size < 4 * elements + 4096


def test_efficient_loading_changes_no_bit_of_a_resumed_run(tmp_path: Path, documents: Path, cache: Path) -> None:
    """Only rank 0 reads the pretrained weights; the last checkpoint is lost and written again."""
    write_recipe(tmp_path / "start", documents, model=TIED, train={"max_steps": 2}, run_dir=str(tmp_path / "start/run"))
    first = start("train", "start/recipe.yaml", cwd=tmp_path, cache=cache)
    assert first.wait() == 0, first.stderr
    tuned: dict[str, Any] = {"path": str(tmp_path / "start/run/model")}
    write_recipe(tmp_path, documents, model={"config": None, **tuned}, tokenizer={"train": None, **tuned})

    run_dirs = {}
    for name, ranks, kind in (("whole", 1, "cpu"), ("efficient", 2, "fsdp2_efficient")):
        run = start("train", "recipe.yaml", f"run_dir={name}", cwd=tmp_path, cache=cache, ranks=ranks, kind=kind)
        assert run.wait() == 0, run.stderr
        run_dirs[name] = tmp_path / name
    assert_same_training(run_dirs["efficient"], run_dirs["whole"])

    expected = outcome(run_dirs["efficient"])
    shutil.rmtree(run_dirs["efficient"] / "checkpoints/step-00000008")
    shutil.rmtree(run_dirs["efficient"] / "model")
    words = ["train", "recipe.yaml", "run_dir=efficient"]
    again = start(*words, cwd=tmp_path, cache=cache, ranks=2, kind="fsdp2_efficient")
    assert again.wait() == 0, again.stderr
    assert "resumed from efficient/checkpoints/step-00000004" in again.stderr
    assert outcome(run_dirs["efficient"]) == expected
