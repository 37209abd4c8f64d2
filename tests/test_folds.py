"""Cross-validation: folds partition the rows, each fold is a separate run, and the scores are averaged."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from preloaded_ranks import preloaded_ptft
from prepare_support import DOCUMENTS, all_ids, prepare, save_tokenizer, write_text
from prepare_support import recipe as clm_recipe
from support import environment, start, wait_until
from tiny import write_tiny

from ptft_dist.api import load_recipe
from ptft_dist.cli.train import train
from ptft_dist.config.recipe import DataSection
from ptft_dist.data.formats import Record
from ptft_dist.data.sides import of_train, sided
from ptft_dist.data.store import TokenStore
from ptft_dist.errors import RecipeError
from ptft_dist.launch.environment import RUN_FILE
from ptft_dist.runs.folds import summarize
from ptft_dist.tasks.common.documents import Documents
from ptft_dist.tasks.registry import recipe_class

FOLDS = {"validation": None, "folds": 3}


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_each_row_is_validated_once(folds: int) -> None:
    texts = [f"row {i}" for i in range(200)]
    validated: list[str] = []
    for fold in range(folds):
        data = DataSection.model_validate({"train": [{"path": "x"}], "folds": folds, "fold": fold})
        records = SimpleNamespace(of=lambda *_: (Record({"text": text}, "x") for text in texts))
        sides = [(place.side, record.values["text"]) for place, record in sided(data, records, Documents.key)]
        assert [text for _, text in sides] == texts
        ours = [text for side, text in sides if side == "validation"]
        trained = [record.values["text"] for record in of_train(data, records, Documents.key)]
        assert trained == [t for t in texts if t not in ours]
        assert abs(len(ours) - 200 / folds) < 200 / folds  # about as many in each
        validated += ours
    assert sorted(validated) == sorted(texts)


def test_each_row_of_a_prepared_classification_is_validated_once(tmp_path: Path, cache: Path) -> None:
    path = write_tiny(tmp_path, "classification", data=FOLDS | {"cache_dir": str(cache)})
    seen: list[str] = []
    for fold in range(3):
        loaded = load_recipe(str(path), [f"data.fold={fold}"])
        prepared = prepare(loaded.recipe, loaded.base)
        assert prepared.validation is not None
        assert len(prepared.train) + len(prepared.validation) == 160
        seen += [prepared.validation.row(i).meta["text"] for i in range(len(prepared.validation))]
    written = [json.loads(line)["text"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert sorted(seen) == sorted(written)


def test_each_document_of_clm_is_validated_once(tmp_path: Path) -> None:
    folder, tokenizer = write_text(tmp_path), save_tokenizer(tmp_path / "tokenizer")
    tokens = validated = 0
    for fold in range(4):
        prepared = prepare(clm_recipe(tokenizer, folds=4, fold=fold), folder)
        assert isinstance(prepared.validation, TokenStore)
        assert isinstance(prepared.train, TokenStore)
        assert prepared.train.documents + prepared.validation.documents == len(DOCUMENTS)
        validated += prepared.validation.documents
        tokens += len(all_ids(prepared.validation))
    assert validated == len(DOCUMENTS)
    whole = prepare(clm_recipe(tokenizer), folder)
    assert tokens == len(all_ids(whole.train))  # type: ignore[arg-type]


def test_prepare_wants_to_know_which_fold(tmp_path: Path) -> None:
    ours = clm_recipe({"vocab_size": 300}, folds=2)
    with pytest.raises(RecipeError, match=r"data\.fold.*ptft train"):
        prepare(ours, write_text(tmp_path))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"fold": 0}, "fold has no effect here"),
        ({"folds": 3, "fold": 3}, "it must be from 0 to 2"),
        ({"folds": 3, "validation": 0.1}, "cannot be used together"),
        ({"folds": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_that_make_no_sense(data: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DataSection.model_validate({"train": [{"path": "x"}], **data})
    assert "folds" in recipe_class().model_fields["data"].annotation.model_fields  # type: ignore[union-attr]


def test_the_summary_is_the_sample_statistics() -> None:
    found = summarize([{"eval/loss": 1.0, "eval/f1": 0.5}, {"eval/loss": 3.0, "eval/f1": 0.5}])
    assert found["eval/loss"] == {"mean": 2.0, "std": pytest.approx(2**0.5), "values": [1.0, 3.0]}
    assert found["eval/f1"] == {"mean": 0.5, "std": 0.0, "values": [0.5, 0.5]}


def result(run: Path, fold: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / f"fold-{fold}/result.json").read_text())
    return found


def test_all_folds_run_and_finished_ones_are_not_run_again(tmp_path: Path, cache: Path) -> None:
    write_tiny(tmp_path, "classification", data=FOLDS | {"folds": 2}, train={"max_steps": 2}, eval={"every": 1})
    forked: dict[str, Any] = {"cwd": tmp_path, "cache": cache, "patches": ["fork_local_runs"]}
    first = start("train", "recipe.yaml", **forked)
    assert first.wait() == 0, first.stderr
    run = tmp_path / "run"
    results = [result(run, i) for i in range(2)]
    summary = json.loads((run / "folds.json").read_text())
    assert summary["folds"] == 2
    assert "eval/f1_macro" in summary["metrics"]
    assert "  metric " in first.stderr
    assert "  fold 0 " in first.stderr
    for name, one in summary["metrics"].items():
        values = [each["metrics"][name] for each in results]
        assert one["values"] == values
        assert one["mean"] == pytest.approx(sum(values) / 2)
        assert one["std"] == pytest.approx(statistics.stdev(values))
        row = [name, *(f"{value:.4g}" for value in values), f"{one['mean']:.4g}", "+-", f"{one['std']:.2g}"]
        assert row in [line.split() for line in first.stderr.splitlines()]
        last = json.loads((run / "fold-1/metrics.jsonl").read_text().splitlines()[-1])
        assert last[name] == values[1]
    for i in range(2):
        assert f"  fold: {i}\n" in (run / f"fold-{i}/resolved.yaml").read_text()

    # One fold is lost: the other is left alone, and the lost one comes back with the same scores.
    shutil.rmtree(run / "fold-1")
    (run / "folds.json").unlink()
    stamp = (run / "fold-0/result.json").stat().st_mtime_ns
    again = start("train", "recipe.yaml", **forked)
    assert again.wait() == 0, again.stderr
    assert "fold 0 of 2: already finished in run/fold-0" in again.stderr
    assert (run / "fold-0/result.json").stat().st_mtime_ns == stamp
    assert json.loads((run / "folds.json").read_text()) == summary

    # With other settings a finished fold is not taken for one of this recipe: its checkpoint refuses.
    other = start("train", "recipe.yaml", "optim.lr=0.5", **forked)
    assert other.wait() == 4
    assert "optim.lr" in other.stderr
    assert "fold 0 of 2 ended with exit code 4" in other.stderr

    # With other data neither: the same recipe no longer means the same rows.
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[:-1]) + "\n")
    other = start("train", "recipe.yaml", **forked)
    assert other.wait() == 4
    assert "already finished" not in other.stderr
    assert "other contents in data.train[0]" in other.stderr


def test_a_signal_is_passed_on_and_the_next_start_goes_on(tmp_path: Path, cache: Path) -> None:
    write_tiny(tmp_path, "classification", data=FOLDS | {"folds": 2}, train={"max_steps": 20_000})
    words = [str(preloaded_ptft() / "ptft"), "train", "recipe.yaml", "eval.every=null", "save.every=null"]
    command = subprocess.Popen(
        words, cwd=tmp_path, env=environment({"PTFT_CACHE": str(cache)}), stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "run/fold-0/metrics.jsonl"
    wait_until(lambda: log.exists() and log.stat().st_size > 0, "the first update of fold 0", 120)
    command.send_signal(signal.SIGTERM)
    _, stderr = command.communicate(timeout=120)
    assert command.returncode == 75, stderr
    assert result(tmp_path / "run", 0)["status"] == "stopped"
    assert not (tmp_path / "run/fold-1").exists()
    assert not (tmp_path / "run/folds.json").exists()
    steps = result(tmp_path / "run", 0)["steps"]
    assert (tmp_path / f"run/fold-0/checkpoints/step-{steps:08d}").is_dir()


def test_the_job_hears_of_the_directory_of_all_folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folds would name theirs: each would then have a history of its own."""
    recipe, heard = write_tiny(tmp_path, "classification", data=FOLDS), tmp_path / "heard"
    heard.touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(RUN_FILE, str(heard))
    told: list[str | None] = []
    monkeypatch.setattr("ptft_dist.runs.folds.run_all", lambda *_, **__: told.append(os.environ.get(RUN_FILE)) or 75)
    with pytest.raises(typer.Exit):
        train(str(recipe))
    assert heard.read_text() == str(tmp_path / "run")
    assert told == [None]


def test_it_is_refused_inside_a_launcher(tmp_path: Path, cache: Path) -> None:
    write_tiny(tmp_path, "classification", data=FOLDS)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, ranks=2)
    assert run.wait() == 2
    assert "data.fold: required with data.folds here" in run.stderr
    assert "outside of a launcher" in run.stderr


@pytest.mark.parametrize(
    ("starter", "says"),
    [
        ("mpirun", "--starter: mpirun: use accelerate, or srun within a task of srun"),
        (
            "srun",
            "--starter: srun: every task of srun would train all folds. Submit them .* ptft submit RECIPE --array",
        ),
    ],
)
def test_a_task_of_srun_does_not_train_all_folds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starter: str, says: str
) -> None:
    recipe = write_tiny(tmp_path, "classification", data=FOLDS)
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setattr("ptft_dist.runs.folds.run_all", lambda *_, **__: pytest.fail("the folds were trained"))
    with pytest.raises(RecipeError, match=says):
        train(str(recipe), launch="cpu", starter=starter)


def test_a_checkpoint_belongs_to_one_fold(tmp_path: Path, cache: Path) -> None:
    write_tiny(tmp_path, "classification", data=FOLDS)
    run = start("train", "recipe.yaml", "--resume", "run/fold-0/checkpoints/step-00000004", cwd=tmp_path, cache=cache)
    assert run.wait() == 2
    assert "--resume: a checkpoint belongs to one fold" in run.stderr


def test_a_fold_that_fails_ends_all_with_its_code(tmp_path: Path, cache: Path) -> None:
    write_tiny(tmp_path, "classification", data=FOLDS)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"text": "no label"}\n')
    ended = start("train", "recipe.yaml", cwd=tmp_path, cache=cache, patches=["fork_local_runs"])
    assert ended.wait() == 3, ended.stderr
    assert "rows.jsonl:161" in ended.stderr
    assert "fold 0 of 3 ended with exit code 3" in ended.stderr
    assert not (tmp_path / "run/fold-1").exists()


def test_options_reach_every_fold(tmp_path: Path, cache: Path) -> None:
    """Two processes in each fold, as the words for the stock launcher say."""
    small = {"train": {"max_steps": 1}, "eval": {"every": None}, "save": {"every": None}}
    write_tiny(tmp_path, "classification", data=FOLDS | {"folds": 2}, **small)
    words = ("train", "recipe.yaml", "--launch", "cpu", "--processes", "2", "--accept", "optim.lr")
    ended = start(*words, cwd=tmp_path, cache=cache, patches=["fork_local_runs", "fork_launched_ranks"])
    assert ended.wait() == 0, ended.stderr
    assert ended.stderr.count("--num_processes 2") == 2
    assert ended.stderr.count("--accept optim.lr") == 2
    for fold in range(2):
        newest = next((tmp_path / f"run/fold-{fold}/checkpoints").glob("step-*"))
        assert json.loads((newest / "manifest.json").read_text())["world_size"] == 2
    assert (tmp_path / "run/folds.json").is_file()
