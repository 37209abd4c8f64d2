"""32: the new head of a classifier is random, and then neither trained nor saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file
from support import start
from tiny import write_tiny

from ptft_dist.engine.state import WEIGHTS

HEADS = {  # task -> the class that the export loads as, and the weights of the head
    "classification": ("AutoModelForSequenceClassification", "classifier."),
    "regression": ("AutoModelForSequenceClassification", "classifier."),
    "token_classification": ("AutoModelForTokenClassification", "classifier."),
    "question_answering": ("AutoModelForQuestionAnswering", "qa_outputs."),
}


def train(recipe: Path, cache: Path) -> None:
    run = start("train", recipe.name, cwd=recipe.parent, cache=cache)
    assert run.wait() == 0, run.stderr


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A BERT that was trained on masked tokens: without any of these heads."""
    folder = tmp_path_factory.mktemp("pretrained")
    train(write_tiny(folder, "mlm", train={"max_steps": 1}, eval={"every": None}), cache)
    return folder / "run/model"


@pytest.mark.parametrize("task", HEADS)
def test_a_new_head_is_trained_and_saved(tmp_path: Path, cache: Path, pretrained: Path, task: str) -> None:
    recipe = write_tiny(tmp_path, task, train={"max_steps": 2}, eval={"every": None}, save={"every": 1})
    raw: dict[str, Any] = json.loads(recipe.read_text())
    raw["model"] = raw["tokenizer"] = {"path": str(pretrained)}
    recipe.write_text(json.dumps(raw))
    train(recipe, cache)

    name, prefix = HEADS[task]
    checkpoints = sorted((tmp_path / "run/checkpoints").iterdir())
    one, two = (head_of(checkpoint / WEIGHTS, prefix) for checkpoint in checkpoints)
    assert sorted(one) == [f"{prefix}bias", f"{prefix}weight"]
    assert not any(one[key].equal(two[key]) for key in one)
    exported, loading = getattr(transformers, name).from_pretrained(tmp_path / "run/model", output_loading_info=True)
    assert not loading["missing_keys"]
    assert all(exported.state_dict()[key].equal(two[key]) for key in two)


def head_of(path: Path, prefix: str) -> dict[str, Any]:
    return {key: value for key, value in load_file(path).items() if key.startswith(prefix)}
