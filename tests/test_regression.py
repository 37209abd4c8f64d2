"""Regression: transformers' head, PyTorch's losses, and the scores of a run against its exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import eval_rows, start
from task_support import for_model, make_task
from test_classification import TEXTS, keys, tokenizer
from test_classification import recipe as classification
from tiny import write_rows, write_tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.encoder import EncoderContext, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.store import Row
from ptft_dist.networks.load import build_config, build_model
from ptft_dist.tasks.protocol import TaskSetup
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.tasks.regression.encode import RegressionRows, number
from ptft_dist.tasks.regression.task import Regression
from ptft_dist.training.batches import mask_all

NUMBERS = [0.25, -3.0, 1e3, 0.0, 2.5, 7.0, 0.1, -0.1, 5.0, 1.0, 3.0, 2.0]


def recipe(**settings: Any) -> Recipe:
    raw = classification().model_dump(mode="json", exclude_unset=True)
    raw |= {"task": "regression", "regression": settings}
    del raw["classification"]
    return recipe_class().model_validate_json(json.dumps(raw), strict=True)


def parts(ours: Recipe) -> tuple[Any, torch.nn.Module, list[Row]]:
    words = tokenizer()
    encoder, rows = RegressionRows(EncoderContext.of(ours, words)), []
    for text, label in zip(TEXTS, NUMBERS, strict=True):
        record = Record({"text": text, "label": label}, "here")
        (example,) = encoder.build(record, encoder.encode(encoder.pieces(record)))
        types = np.array(example.columns["token_type_ids"], np.int64)
        columns = {"token_type_ids": types, "labels": np.array([example.columns["labels"]], np.float32)}
        rows.append(Row(np.array(example.columns["input_ids"], np.int64), np.zeros(1, np.int64), columns))
    task: Any = make_task(ours, words, {})
    config = build_config(ours.model, words, 32, Regression.config_settings(TaskSetup.of(ours, words, {})))
    model = build_model(ours.model, config, 0, task.auto_class).eval()
    task = for_model(task, model)
    return task, model, rows


@pytest.mark.parametrize("loss", ["mse", "mae", "huber"])
def test_the_loss_is_that_of_pytorch_and_transformers(loss: str) -> None:
    task, model, rows = parts(recipe(loss=loss))
    batches = [task.collate(rows[:7], keys(7)), task.collate(rows[7:], keys(5))]
    with torch.no_grad():
        outs = [task.loss(model, batch.inputs) for batch in batches]
        whole = task.collate(rows, keys(12)).inputs
        plain = {k: x for k, x in whole.items() if k != "targets"}
        theirs = model(**plain, labels=torch.tensor(NUMBERS))
    expected = {
        "mse": torch.nn.MSELoss(),
        "mae": torch.nn.L1Loss(),
        "huber": torch.nn.HuberLoss(),
    }[loss](theirs.logits[:, 0], torch.tensor(NUMBERS))
    mean = sum(out.loss_sum.item() for out in outs) / sum(batch.count for batch in batches)
    assert mean == pytest.approx(expected.item(), rel=1e-5)
    if loss == "mse":
        assert model.config.problem_type == "regression"
        assert mean == pytest.approx(theirs.loss.item(), rel=1e-5)


def test_a_stand_in_counts_nothing() -> None:
    task, model, rows = parts(recipe())
    loss, *_ = task.loss(model, mask_all(task.collate(rows[:2], keys(2)).inputs))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.abs().max() for p in model.parameters())


@pytest.mark.parametrize(("label", "value"), [(3, 3.0), (-0.5, -0.5), ("2.5", 2.5), (" 7 ", 7.0), ("1e-3", 0.001)])
def test_numbers(label: Any, value: float) -> None:
    assert number(Record({"label": label}, "here")) == value


@pytest.mark.parametrize("label", [True, [1.0], "much", "", "nan", float("inf"), None, {"a": 1}, 1e39, 10**400])
def test_what_is_no_number(label: Any) -> None:
    with pytest.raises(RowError):
        number(Record({"label": label}, "here"))


def test_the_scores_are_those_of_the_exported_model(tmp_path: Path, cache: Path) -> None:
    """Pairs, on two ranks, with validation rows that do not divide; scores by scikit-learn and SciPy."""
    from scipy import stats
    from sklearn import metrics

    write_tiny(tmp_path, "regression")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    held = [row | {"text": " ".join(row["text"].split()[:6]), "text_pair": "red dog"} for row in rows[:17]]
    write_rows(tmp_path / "rows.jsonl", rows[17:])
    write_rows(tmp_path / "held.jsonl", held)
    raw = json.loads((tmp_path / "recipe.yaml").read_text())
    raw["data"]["validation"] = [{"path": "held.jsonl"}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    run = start("train", "recipe.yaml", "eval.micro_size=4", cwd=tmp_path, cache=cache, ranks=2)
    assert run.wait() == 0, run.stderr
    scores = {key.removeprefix("eval/"): value for key, value in eval_rows(tmp_path / "run")[-1].items()}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    words = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    said = []
    for row in held:
        inputs = words(row["text"], row["text_pair"], return_tensors="pt", truncation=True, max_length=32)
        assert bool((inputs["token_type_ids"] == 1).any())
        with torch.no_grad():
            said.append(model(**inputs).logits.item())
    gold = [row["label"] for row in held]
    assert scores["mse"] == pytest.approx(metrics.mean_squared_error(gold, said), rel=1e-4)
    assert scores["loss"] == pytest.approx(scores["mse"], rel=1e-5)
    assert scores["mae"] == pytest.approx(metrics.mean_absolute_error(gold, said), rel=1e-4)
    assert scores["pearson"] == pytest.approx(stats.pearsonr(gold, said).statistic, abs=1e-3)
    assert scores["spearman"] == pytest.approx(stats.spearmanr(gold, said).statistic, abs=1e-2)
