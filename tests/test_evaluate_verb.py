"""`ptft evaluate` on finished runs, on model directories and on other rows."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support import eval_rows, make_recipe, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import write_tiny
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ptft_dist import api
from ptft_dist.data.formats import Record
from ptft_dist.data.sides import _fraction
from ptft_dist.errors import CheckpointError, DataError, RecipeError
from ptft_dist.judging.target import Target
from ptft_dist.tasks.registry import encoder_class

SHORT: dict[str, Any] = {"train": {"max_steps": 4}, "save": {"every": None}, "eval": {"every": None}}
TEXTS = ["ab cd", "dog eat dog", "a b c d e f g", "the end", "one two"]
WORDPIECE = {"tokenizer": {"train": {"algorithm": "wordpiece", "vocab_size": 300}}, "task": "clm"}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, documents: Path, cache: Path) -> Path:
    """The folder of a finished run of clm."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "recipe.yaml").write_text(json.dumps(make_recipe(documents, **SHORT)))
    run = start("train", "recipe.yaml", cwd=folder, cache=cache)
    assert run.wait() == 0, run.stderr
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTFT_CACHE", str(cache))


def last_metrics(run: Path) -> dict[str, float]:
    return {key: value for key, value in eval_rows(run)[-1].items() if key.startswith("eval/")}


def perplexity(model_dir: Path, texts: list[str]) -> tuple[float, float]:
    """Loss per token and perplexity with transformers alone, text by text; each text ends with EOS."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_dir), AutoTokenizer.from_pretrained(model_dir)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    return total / count, math.exp(total / count)


def test_a_run_is_evaluated_from_anywhere(trained: Path) -> None:
    """With its own recipe, whose paths start elsewhere. Only the result is written to its directory."""

    def files() -> set[tuple[Path, int]]:
        return {(path, path.stat().st_mtime_ns) for path in (trained / "run").rglob("*") if path.is_file()}

    before = files()
    other = api.evaluate_model(trained / "run", overrides={"eval.max_rows": 3})
    assert files() == before
    result = api.evaluate_model(trained / "run")
    assert result.metrics == pytest.approx(last_metrics(trained / "run"), rel=1e-6)
    assert (result.model, result.recipe) == (str(trained / "run/model"), str(trained / "run/resolved.yaml"))
    assert other.rows == 3 < result.rows
    written = {path for path, _ in files() - before}
    events = {path for path in written if path.parent == trained / "run/tensorboard/evaluate"}
    assert written - events == {trained / "run" / name for name in ("evaluation.json", "evaluation.rows.jsonl")}
    found = EventAccumulator(str(trained / "run/tensorboard/evaluate")).Reload()
    assert [(e.step, e.value) for e in found.Scalars("evaluate/loss")] == [
        (4, pytest.approx(result.metrics["eval/loss"]))
    ]
    assert b"perplexity" in found.Tensors("evaluate/text_summary")[0].tensor_proto.string_val[0]
    for path in written:
        path.unlink()


def test_other_rows_have_the_perplexity_of_transformers(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("\n".join(TEXTS))
    result = api.evaluate_model(trained / "run", data="rows.txt", out="results/own.json")
    loss, expected = perplexity(trained / "run/model", TEXTS)
    assert result.metrics["eval/loss"] == pytest.approx(loss, rel=1e-5)
    assert result.metrics["eval/perplexity"] == pytest.approx(expected, rel=1e-5)
    written = json.loads((tmp_path / "results/own.json").read_text())
    assert written == result.values()
    assert written["rows"] == len(TEXTS)
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["own.json", "own.rows.jsonl"]


def test_a_file_of_another_format(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    result = api.evaluate_model(trained / "run", data="rows.jsonl")
    assert result.metrics["eval/loss"] == pytest.approx(perplexity(trained / "run/model", TEXTS)[0], rel=1e-5)
    assert result.rows == len(TEXTS)


def test_two_processes_print_and_write_once(trained: Path, tmp_path: Path, cache: Path) -> None:
    (tmp_path / "rows.txt").write_text("\n".join(TEXTS))
    words = ("evaluate", str(trained / "run"), "--data", "rows.txt", "--out", "own.json")
    for ranks in (1, 2):
        done = start(*words, cwd=tmp_path, cache=cache, ranks=ranks)
        assert done.wait() == 0, done.stderr
        written = json.loads((tmp_path / "own.json").read_text())
        assert written["metrics"]["eval/loss"] == pytest.approx(perplexity(trained / "run/model", TEXTS)[0], rel=1e-5)
        assert written["rows"] == len(TEXTS)
        first = done.stdout.splitlines()[: 1 + len(written["metrics"])]
        table = dict(line.split() for line in first)
        assert len(first) == len(table)
        assert done.stdout.count("eval/loss") == 1
        assert table["eval/loss"] == f"{written['metrics']['eval/loss']:.6g}"
        (tmp_path / "own.json").unlink()


def test_two_processes_report_a_mistake_once(trained: Path, tmp_path: Path, cache: Path) -> None:
    """Before a process group exists."""
    words = ("evaluate", str(trained / "run"), "--data", "nothing.txt", "--out", "own.json")
    done = start(*words, cwd=tmp_path, cache=cache, ranks=2)
    assert done.wait() == 3
    assert done.exit_codes == [3, 3]
    assert done.stderr.count("nothing.txt does not exist. Give a file with validation rows") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "own.json").exists()
    assert not (trained / "run/result.json").read_text().count("failed")


def test_a_signal_ends_it_without_a_file(trained: Path, tmp_path: Path, cache: Path) -> None:
    words = ("evaluate", str(trained / "run"), "--out", "own.json")
    done = start(*words, cwd=tmp_path, cache=cache, patches=["slow_score:30"], env={"SLURM_JOB_ID": "7"})
    done.until((tmp_path / "evaluating").exists, "the evaluation")
    os.kill(done.processes[0].pid or 0, signal.SIGTERM)
    assert done.wait() == 75
    assert "stopped by SIGTERM during the evaluation; the same command goes on" in done.stderr
    assert not (tmp_path / "own.json").exists()


def test_another_model_needs_a_recipe(trained: Path, tmp_path: Path, cache: Path) -> None:
    copy = shutil.copytree(trained / "run/model", tmp_path / "copy")
    recipe = trained / "recipe.yaml"
    assert api.evaluate_model(copy, recipe).metrics == api.evaluate_model(trained / "run").metrics
    assert api.evaluate_model(copy, recipe, {"eval.max_rows": 3}).rows == 3
    for model in (copy, "some/hub-name"):
        with pytest.raises(RecipeError, match=r"no run directory \(it has no resolved\.yaml\), so a recipe is needed"):
            api.evaluate_model(model)
    with pytest.raises(RecipeError, match="model: there is no directory nowhere/at/all"):
        api.evaluate_model("nowhere/at/all")
    done = start("evaluate", "copy", str(recipe), "eval.max_rows=3", cwd=tmp_path, cache=cache)
    assert done.wait() == 0, done.stderr
    assert done.stdout.startswith("rows             3\n")
    done = start("evaluate", "copy", "eval.max_rows=3", cwd=tmp_path, cache=cache)
    assert done.wait() == 2
    assert "give a RECIPE after the model, or a file with rows" in done.stderr


def test_what_is_missing_is_said(trained: Path, tmp_path: Path) -> None:
    recipe = trained / "recipe.yaml"
    with pytest.raises(RecipeError, match=r"model: there is no directory \./nowhere"):
        api.evaluate_model("./nowhere", recipe)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: there is no model"):
        api.evaluate_model("empty", recipe)
    with pytest.raises(RecipeError, match="empty: this is a directory"):
        api.evaluate_model(trained / "run", out="empty")
    with pytest.raises(DataError, match=r"rows\.txt does not exist"):
        api.evaluate_model(trained / "run", data="rows.txt")


def test_a_learned_wordpiece_keeps_its_ids(
    tmp_path: Path, documents: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learned again for another split and in another cache, it would have other ids. A model elsewhere is refused."""
    recipe = make_recipe(documents, **SHORT, **WORDPIECE)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    (tmp_path / "rows.txt").write_text("\n".join(TEXTS))
    monkeypatch.setenv("PTFT_CACHE", str(tmp_path / "other"))
    result = api.evaluate_model("run", data="rows.txt")
    assert result.metrics["eval/loss"] == pytest.approx(perplexity(tmp_path / "run/model", TEXTS)[0], rel=1e-5)

    shutil.copytree("run/model", "copy")
    changed = {"data.validation": 0.3}
    with pytest.raises(RecipeError, match=r"the recipe's tokenizer has other ids for .* Set tokenizer=\{path: copy\}"):
        api.evaluate_model("copy", "recipe.yaml", changed)
    result = api.evaluate_model("copy", "recipe.yaml", ["tokenizer={path: copy}"], data="rows.txt")
    assert result.metrics["eval/loss"] == pytest.approx(perplexity(tmp_path / "copy", TEXTS)[0], rel=1e-5)


def test_labels_are_those_of_the_run(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training rows of the other split have a third label, which the head does not know; the run has skipped it as
    a validation row. The columns are mapped like those of the sources."""
    recipe = json.loads(write_tiny(tmp_path, "classification", **SHORT).read_text())
    path = Path(recipe["data"]["train"][0]["path"])
    rows = [json.loads(line) for line in (tmp_path / path).read_text().splitlines()]
    named = [{"sentence": row["text"], "gold": row["label"]} for row in rows]
    key = encoder_class("classification").key
    candidates = (Record({"text": f"red {i}", "label": "plant"}, "") for i in range(100))
    plant = next(record for record in candidates if _fraction(key(record)) < 0.2)
    odd = {"sentence": plant.values["text"], "gold": "plant"}
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*named, odd]))
    source = {"path": "named.jsonl", "fields": {"text": "sentence", "label": "gold"}}
    recipe["data"] |= {"train": [source], "validation": 0.2, "bad_rows": "skip"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named[:30]))
    with monkeypatch.context() as patch:
        patch.setattr(Target, "survey", {})
        with pytest.raises(RecipeError, match="was trained for the labels animal, thing"):
            api.evaluate_model("run", data="own.jsonl")
    result = api.evaluate_model("run", data="own.jsonl")
    model, tokenizer = (
        each.from_pretrained("run/model") for each in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    right = 0
    for row in named[:30]:
        logits = model(**tokenizer(row["sentence"], return_tensors="pt")).logits[0]
        right += model.config.id2label[int(logits.argmax())] == row["gold"]
    assert result.rows == 30
    assert result.metrics["eval/accuracy"] == pytest.approx(right / 30)
