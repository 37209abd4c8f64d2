"""What a run can be told to do: precision, memory savings, the best checkpoint, early stopping, what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import eval_rows, file_digest, ptft, start, train_rows, write_recipe

Model = dict[str, Any]


def run(tmp_path: Path, documents: Path, cache: Path, name: str = "run", code: int = 0, **changes: Any) -> Path:
    recipe = write_recipe(tmp_path / f"recipe-{name}", documents, **changes)
    done = start("train", str(recipe), f"run_dir={name}", cwd=tmp_path, cache=cache)
    assert done.wait() == code, done.stderr
    return tmp_path / name


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in train_rows(run_dir)]


def test_the_files_of_a_run(tmp_path: Path, documents: Path, cache: Path) -> None:
    run_dir = run(tmp_path, documents, cache, eval={"every": 4, "at_start": True})
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    assert model.config.use_cache
    ids = tokenizer("abc def", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()
    last = load_file(run_dir / "checkpoints/step-00000008/model.safetensors")
    for name, value in load_file(run_dir / "model/model.safetensors").items():
        assert torch.equal(value, last[name]), name

    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["exit_code"], result["steps"]) == ("finished", 0, 8)
    assert result["tokens"] == train_rows(run_dir)[-1]["tokens"] > 0
    assert [row["step"] for row in eval_rows(run_dir)] == [0, 4, 8]
    assert result["metrics"]["eval/loss"] == eval_rows(run_dir)[-1]["eval/loss"]
    assert (run_dir / "recipe.yaml").read_text() == (tmp_path / "recipe-run/recipe.yaml").read_text()
    assert ptft("config", "check", str(run_dir / "resolved.yaml")).returncode == 0

    text = ptft("generate", str(run_dir), "--prompt", "abc", "--max-new-tokens", "4")
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("abc")
    again = ptft("generate", str(run_dir), "--prompt", "abc", "--max-new-tokens", "4")
    assert text.stdout == again.stdout


def test_gradient_checkpointing_and_workers_change_no_loss(tmp_path: Path, documents: Path, cache: Path) -> None:
    plain = losses(run(tmp_path, documents, cache, "plain"))
    model = {"gradient_checkpointing": True}
    assert losses(run(tmp_path, documents, cache, "saving", model=model)) == pytest.approx(plain, rel=1e-6)
    assert losses(run(tmp_path, documents, cache, "workers", data={"workers": 2})) == plain


def test_a_compiled_network_has_the_same_losses_and_names(tmp_path: Path, documents: Path, cache: Path) -> None:
    short: dict[str, Any] = {"train": {"max_steps": 2}, "data": {"validation": None}, "eval": {"every": None}}
    plain = run(tmp_path, documents, cache, "plain", **short)
    compiled = run(tmp_path, documents, cache, "compiled", **short, model={"compile": True})
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-5)
    names = set(load_file(compiled / "model/model.safetensors"))
    assert names == set(load_file(tmp_path / "plain/model/model.safetensors"))


def test_bf16_is_near_fp32_and_keeps_fp32_weights(tmp_path: Path, documents: Path, cache: Path) -> None:
    plain = losses(run(tmp_path, documents, cache, "plain"))
    run_dir = run(tmp_path, documents, cache, "bf16", train={"precision": "bf16"})
    assert losses(run_dir) != plain
    assert losses(run_dir) == pytest.approx(plain, rel=0.02)
    weights = load_file(run_dir / "model/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_early_stopping_and_the_best_checkpoint(tmp_path: Path, documents: Path, cache: Path) -> None:
    """A rate that ruins the model after a few updates: the best evaluation is an early one."""
    changes: dict[str, Any] = {
        "optim": {"lr": 0.5, "schedule": "constant", "warmup": 30, "max_grad_norm": None},
        "train": {"max_steps": 40},
        "eval": {"every": 2, "patience": 3},
        "save": {"every": 2, "keep": 1, "best": True, "export": "best"},
    }
    run_dir = run(tmp_path, documents, cache, **changes)
    evaluations = {row["step"]: row["eval/loss"] for row in eval_rows(run_dir)}
    best = min(evaluations, key=lambda step: evaluations[step])
    after = [step for step in evaluations if step > best]
    assert len(after) == 3, evaluations  # patience
    assert all(evaluations[step] >= evaluations[best] for step in after)
    kept = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert kept == [f"step-{best:08d}", f"step-{max(evaluations):08d}"]
    result = json.loads((run_dir / "result.json").read_text())
    assert result["reason"] == "out of patience"
    assert result["best"] == {"step": best, "loss": evaluations[best]}
    exported, stored = (
        load_file(run_dir / "model/model.safetensors"),
        load_file(run_dir / f"checkpoints/step-{best:08d}/model.safetensors"),
    )
    assert all(torch.equal(value, stored[name]) for name, value in exported.items())


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path, documents: Path, cache: Path) -> None:
    run_dir = run(tmp_path, documents, cache)
    before = (run_dir / "metrics.jsonl").read_text(), file_digest(run_dir / "model/model.safetensors")
    run(tmp_path, documents, cache)
    assert before == ((run_dir / "metrics.jsonl").read_text(), file_digest(run_dir / "model/model.safetensors"))


def test_going_on_from_a_pretrained_model(tmp_path: Path, documents: Path, cache: Path) -> None:
    """model.path and tokenizer.path take what a run exported: the first loss is about the last one of that run."""
    first = run(tmp_path, documents, cache, "first", train={"max_steps": 30})
    recipe = json.loads((tmp_path / "recipe-first/recipe.yaml").read_text())
    model = str(first / "model")
    recipe |= {"model": {"path": model}, "tokenizer": {"path": model}}
    path = tmp_path / "second.yaml"
    path.write_text(json.dumps(recipe))
    done = start("train", str(path), "run_dir=second", "eval.at_start=true", cwd=tmp_path, cache=cache)
    assert done.wait() == 0, done.stderr
    assert eval_rows(tmp_path / "second")[0]["eval/loss"] == pytest.approx(eval_rows(first)[-1]["eval/loss"], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, documents: Path, cache: Path) -> None:
    """Exit code 5, the last good checkpoint stays, and nothing is logged as if it were a number."""
    changes: dict[str, Any] = {"optim": {"lr": 1e30, "warmup": 0, "max_grad_norm": None, "schedule": "constant"}}
    run_dir = run(tmp_path, documents, cache, code=5, save={"every": 1}, **changes)
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", 5)
    assert "optim.lr" in result["error"]
    assert all(abs(loss) < float("inf") for loss in losses(run_dir))
    assert ptft("checkpoints", str(run_dir)).returncode == 0
