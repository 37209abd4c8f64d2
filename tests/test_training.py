"""Options of a run: precision, memory savings, the best checkpoint, early stopping, output files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import in_process
import pytest
import torch
from preloaded_ranks import forked_ptft
from safetensors.torch import load_file
from support import eval_rows, file_digest, make_recipe, merge, outcome, start, train_rows, write_recipe

from ptft_dist.checkpoint.checkpoint import read_checkpoint
from ptft_dist.run import Result, _about_the_best
from ptft_dist.training.progress import Judge, RunProgress
from ptft_dist.training.trainer import Trainer
from ptft_dist.training.validation import Validation

Model = dict[str, Any]


def run(
    tmp_path: Path,
    documents: Path,
    cache: Path,
    name: str = "run",
    code: int = 0,
    patches: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    **changes: Any,
) -> Path:
    recipe = write_recipe(tmp_path / f"recipe-{name}", documents, **changes)
    done = start("train", str(recipe), f"run_dir={name}", cwd=tmp_path, cache=cache, patches=patches, env=env)
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
    checked = start("config", "check", str(run_dir / "resolved.yaml"), cwd=tmp_path, cache=cache)
    assert checked.wait() == 0, checked.stderr

    generate = ("generate", str(run_dir), "--prompt", "abc", "--max-new-tokens", "4")
    text = forked_ptft(*generate)
    assert text.returncode == 0, text.stderr
    assert text.stdout.startswith("abc")
    again = start(*generate, cwd=tmp_path, cache=cache)
    assert again.wait() == 0, again.stderr
    assert text.stdout == again.stdout


def test_gradient_checkpointing_and_workers_change_no_loss(tmp_path: Path, documents: Path, cache: Path) -> None:
    short: dict[str, Any] = {"train": {"max_steps": 4}, "eval": {"every": None}, "save": {"every": None}}
    plain = losses(run(tmp_path, documents, cache, "plain", **short))
    assert len(plain) == 4
    model = {"gradient_checkpointing": True}
    assert losses(run(tmp_path, documents, cache, "saving", model=model, **short)) == pytest.approx(plain, rel=1e-6)
    assert losses(run(tmp_path, documents, cache, "workers", **merge(short, {"data": {"workers": 2}}))) == plain


def test_a_compiled_network_has_the_same_losses_and_names(tmp_path: Path, documents: Path, cache: Path) -> None:
    """The smallest network, because each kernel costs seconds of a C++ compiler."""
    short: dict[str, Any] = {"train": {"max_steps": 2}, "data": {"validation": None}, "eval": {"every": None}}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64, **dropout}
    (tmp_path / "recipe.yaml").write_text(json.dumps(make_recipe(documents, **short) | {"model": {"config": config}}))
    in_process = {
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # instead of processes that import torch first
        "TORCHINDUCTOR_VEC_ISA_OK": "1",  # instead of trying the instructions that the processor says it has
    }
    for name in ("plain", "compiled"):
        words = (f"run_dir={name}", f"model.compile={str(name == 'compiled').lower()}")
        done = start("train", "recipe.yaml", *words, cwd=tmp_path, cache=cache, env=in_process)
        assert done.wait() == 0, done.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    plain, compiled = (load_file(tmp_path / name / "model/model.safetensors") for name in ("plain", "compiled"))
    assert compiled.keys() == plain.keys()


def test_bf16_is_near_fp32_and_keeps_fp32_weights(tmp_path: Path, documents: Path, cache: Path) -> None:
    plain = losses(run(tmp_path, documents, cache, "plain"))
    run_dir = run(tmp_path, documents, cache, "bf16", train={"precision": "bf16"})
    assert losses(run_dir) != plain
    assert losses(run_dir) == pytest.approx(plain, rel=0.02)
    weights = load_file(run_dir / "model/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}


def test_early_stopping_and_the_best_checkpoint(tmp_path: Path, documents: Path, cache: Path) -> None:
    """The losses of the evaluations are made: a better one after a worse one resets the patience, and the best is not
    the last."""
    made = {2: 3.0, 4: 4.0, 6: 2.0, 8: 3.0, 10: 2.0, 12: 1.0}  # as good as the best is not better
    changes: dict[str, Any] = {
        "train": {"max_steps": 40},
        "eval": {"every": 2, "patience": 2},
        "save": {"every": 2, "keep": 1, "best": True, "export": "best"},
    }
    run_dir = run(tmp_path, documents, cache, patches=[patch_of(made)], **changes)
    evaluations = {row["step"]: row for row in eval_rows(run_dir)}
    assert {step: row["eval/loss"] for step, row in evaluations.items()} == {2: 3.0, 4: 4.0, 6: 2.0, 8: 3.0, 10: 2.0}
    kept = sorted(p.name for p in (run_dir / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000010"]
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["reason"], result["steps"]) == ("stopped early: out of patience", 10)
    assert result["best"] == {"metric": "loss", "value": 2.0, "step": 6}
    assert result["metrics_step"] == 6  # of the exported weights
    assert result["metrics"] == {name: x for name, x in evaluations[6].items() if name.startswith("eval/")}
    exported, stored = (
        load_file(run_dir / "model/model.safetensors"),
        load_file(run_dir / "checkpoints/step-00000006/model.safetensors"),
    )
    assert all(torch.equal(value, stored[name]) for name, value in exported.items())


def patch_of(losses: dict[int, float]) -> str:
    return ":".join(["evaluations", *(f"{step}={loss}" for step, loss in losses.items())])


def test_patience_goes_on_at_a_resume(tmp_path: Path, documents: Path, cache: Path) -> None:
    """Killed between two worse evaluations, the run stops after the same update as one that was not killed.

    A checkpoint is saved before the evaluation of its update: the one of update 3 knows the worse evaluation of 2.
    """
    changes: dict[str, Any] = {
        "train": {"max_steps": 8},
        "eval": {"every": 1, "patience": 3},
        "save": {"every": 1, "keep": None},
    }
    made = patch_of({step: float(step) for step in range(1, 9)})
    whole = run(tmp_path, documents, cache, "whole", patches=[made], **changes)
    run(tmp_path, documents, cache, "killed", code=1, patches=[made, "raise_in_rank:0:4"], **changes)
    killed = run(tmp_path, documents, cache, "killed", patches=[made], **changes)
    assert json.loads((whole / "result.json").read_text())["steps"] == 4
    assert outcome(killed) == outcome(whole)


def test_another_judge_begins_a_new_count_of_worse_evaluations() -> None:
    """With another metric the old best is dropped, and patience starts again with it."""
    loss, accuracy = Judge("loss", False, "10 rows"), Judge("accuracy", True, "10 rows")
    progress = RunProgress(step=1)
    for step, value in ((1, 3.0), (2, 4.0), (3, 5.0)):
        progress.step = step
        progress.judge(loss, {"loss": value}, value)
    assert progress.worse_evaluations == 2
    assert progress.forget_incomparable(loss) is None
    assert progress.worse_evaluations == 2
    dropped = progress.forget_incomparable(accuracy)
    assert dropped is not None
    assert (dropped.step, dropped.value) == (1, 3.0)
    assert (progress.best, progress.worse_evaluations) == (None, 0)


@pytest.mark.parametrize(
    ("goal", "start", "said"),
    [
        ("min", 3.0, "the best loss was 2, after update 4"),
        ("min", 1.5, "the best loss was 2, after update 4; 1.5 before the training was better"),
        ("max", 1.5, "the best loss was 2, after update 4"),
        ("max", 3.0, "the best loss was 2, after update 4; 3 before the training was better"),
    ],
)
def test_the_best_evaluation_is_not_called_the_best_if_the_network_was_better_before(
    goal: str, start: float, said: str
) -> None:
    result = Result("finished", "", 6, Path(), None, {}, 6, {"metric": "loss", "value": 2.0, "step": 4}, [])
    recipe = SimpleNamespace(eval=SimpleNamespace(larger_is_better=goal == "max"), save=SimpleNamespace(export="last"))
    assert _about_the_best(result, {"eval/loss": start}, recipe) == said  # type: ignore[arg-type]


def test_a_manifest_whose_best_cannot_be_compared_starts_patience_again() -> None:
    """Version 0.1 wrote the best value without its metric, goal and rows."""
    old = {"step": 9, "tokens": 5, "best": 2.5, "best_step": 3, "worse_evaluations": 3, "evaluated_step": 9}
    progress = RunProgress.from_dict(old)
    assert (progress.step, progress.tokens, progress.evaluated_step) == (9, 5, 9)
    assert (progress.best, progress.worse_evaluations) == (None, 0)


def test_the_summary_compares_the_last_metrics_with_the_first(tmp_path: Path, documents: Path, cache: Path) -> None:
    """The losses of the three evaluations are given by a patch; a resume keeps the first."""
    write_recipe(tmp_path, documents, eval={"every": 3})
    made = patch_of({3: 4.0, 6: 3.0, 8: 3.0})
    start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=[made, "die_in_rank:0:8"]).wait()
    done = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=[made])
    assert done.wait() == 0, done.stderr
    assert "resumed from" in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "eval/loss" in line]
    assert line.split() == ["eval/loss", "4", "->", "3", "(-1)"]


def test_tokens_are_those_read(tmp_path: Path) -> None:
    """Not the labels, of which an unpacked row has one less than tokens, and not the padding."""
    lengths = [2, 5, 9, 17, 3, 30]
    recipe = in_process.make_recipe()  # an update has six rows: all of them
    store = in_process.make_store(tmp_path / "store", lengths)
    with in_process.make_trainer(tmp_path, store, recipe) as (trainer, kept):
        trainer.fit()
    assert [row["tokens"] for row in kept.rows] == [66, 132, 198, 264]
    assert [row["loss_tokens"] for row in kept.rows] == [60] * 4


def test_the_last_update_is_logged_whatever_log_every_says(tmp_path: Path) -> None:
    recipe = in_process.make_recipe(log={"every": 3}, train={"max_steps": 7})
    store = in_process.make_store(tmp_path / "store", [9] * 6)
    with in_process.make_trainer(tmp_path, store, recipe) as (trainer, kept):
        trainer.fit()
    assert [row["step"] for row in kept.rows] == [3, 6, 7]


def test_an_evaluation_is_recorded_in_this_run_s_checkpoint_alone(tmp_path: Path) -> None:
    recipe, store = in_process.make_recipe(), in_process.make_store(tmp_path / "store", in_process.ragged(6))
    with in_process.make_trainer(tmp_path / "mine", store, recipe) as (trainer, _):
        trainer.fit()
        trainer.progress.evaluated_step = 4
        trainer.record_evaluation()
    mine = read_checkpoint(tmp_path / "mine/checkpoints/step-00000004")
    assert mine.manifest["progress"]["evaluated_step"] == 4
    with in_process.make_trainer(tmp_path / "other", store, recipe) as (trainer, _):
        trainer.restore(mine)
        assert trainer.progress.evaluated_step == 4
        trainer.progress.evaluated_step = 5
        trainer.record_evaluation()
    assert read_checkpoint(mine.path) == mine
    assert not (tmp_path / "other").exists()


class Scored:
    """Validation rows whose losses are given by update."""

    identity = "rows"

    def __init__(self, trainer: Trainer, losses: dict[int, float]) -> None:
        self.trainer, self.losses = trainer, losses

    def score(self, *_: Any) -> Any:
        return {"loss": self.losses[self.trainer.progress.step]}, []


def test_the_best_checkpoint_is_one_of_this_run(tmp_path: Path) -> None:
    """A run goes on from a checkpoint of another one, whose best checkpoint it does not have: its own best counts."""
    store, losses = in_process.make_store(tmp_path / "store", in_process.ragged(6)), {2: 1.0, 4: 2.0, 6: 4.0, 8: 3.0}
    changes: dict[str, Any] = {
        "data": {"validation": 0.5},
        "eval": {"every": 2, "patience": 3},
        "save": {"every": 2, "keep": 1, "best": True, "export": "best"},
    }
    for name, updates, best in (("mine", 4, 2), ("other", 8, 4)):
        recipe = in_process.make_recipe(train={"max_steps": updates}, **changes)
        with in_process.make_trainer(tmp_path / name, store, recipe) as (trainer, _):
            trainer.validation = cast(Validation, Scored(trainer, losses))
            if name == "other":
                trainer.restore(read_checkpoint(tmp_path / "mine/checkpoints/step-00000004"))
            trainer.fit()
            assert trainer.progress.best_checkpoint is not None
            assert trainer.progress.best_checkpoint.step == best
        kept = sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
        assert kept == [f"step-{best:08d}", f"step-{updates:08d}"]


def test_a_finished_run_started_again_changes_nothing(tmp_path: Path, documents: Path, cache: Path) -> None:
    run_dir = run(tmp_path, documents, cache)
    before = (run_dir / "metrics.jsonl").read_text(), file_digest(run_dir / "model/model.safetensors")
    run(tmp_path, documents, cache)
    assert before == ((run_dir / "metrics.jsonl").read_text(), file_digest(run_dir / "model/model.safetensors"))


def test_going_on_from_a_pretrained_model(tmp_path: Path, documents: Path, cache: Path) -> None:
    """model.path and tokenizer.path take what a run exported: the first loss is about the last one of that run."""
    first = run(tmp_path, documents, cache, "first")
    recipe = json.loads((tmp_path / "recipe-first/recipe.yaml").read_text())
    model = str(first / "model")
    recipe |= {"model": {"path": model}, "tokenizer": {"path": model}}
    path = tmp_path / "second.yaml"
    path.write_text(json.dumps(recipe))
    done = start("train", str(path), "run_dir=second", "eval.at_start=true", cwd=tmp_path, cache=cache)
    assert done.wait() == 0, done.stderr
    assert eval_rows(tmp_path / "second")[0]["eval/loss"] == pytest.approx(eval_rows(first)[-1]["eval/loss"], rel=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, documents: Path, cache: Path) -> None:
    """Exit code 5; the last good checkpoint is kept, and NaN is not logged."""
    changes: dict[str, Any] = {"optim": {"lr": 1e30, "warmup": 0, "max_grad_norm": None, "schedule": "constant"}}
    run_dir = run(tmp_path, documents, cache, code=5, save={"every": 1}, **changes)
    result = json.loads((run_dir / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("failed", 5)
    assert "optim.lr" in result["error"]
    assert all(abs(loss) < float("inf") for loss in losses(run_dir))
    listed = start("checkpoints", str(run_dir), cwd=tmp_path, cache=cache)
    assert listed.wait() == 0, listed.stderr
