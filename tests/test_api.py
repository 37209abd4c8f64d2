"""The Python API, for notebooks and scripts."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import MICRO_SIZE, environment, make_recipe

import ptft_dist
from ptft_dist.errors import CheckpointError, DataError, RecipeError
from ptft_dist.launch.environment import place
from ptft_dist.reporting.messages import hide_messages
from ptft_dist.run import libraries_restored
from ptft_dist.session import Session


@pytest.fixture
def recipe(tmp_path: Path, documents: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A recipe as nested dictionaries."""
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    hide_messages()  # another test of this process may have run the command line
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_recipe(documents, train={"max_steps": 4}, eval={"every": 2, "micro_size": None}, save={"every": 2})
    torch.set_num_threads(threads)


def test_a_dictionary_trains(recipe: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    result = ptft_dist.train(recipe, {"optim.lr": 1e-3, "run_dir": str(tmp_path / "other")})
    assert (result.status, result.steps, result.exit_code) == ("finished", 4, 0)
    assert result.run_dir == tmp_path / "other"
    assert result.model == tmp_path / "other/model"
    assert [row["step"] for row in result.history if "loss" in row] == [1, 2, 3, 4]
    assert max(row["lr"] for row in result.history if "lr" in row) == 1e-3
    assert result.metrics["eval/loss"] == result.history[-1]["eval/loss"]
    assert result.best is not None
    assert result.best["metric"] == "loss"
    AutoModelForCausalLM.from_pretrained(result.model)
    written = json.loads((tmp_path / "other/result.json").read_text())
    assert written["metrics"] == result.metrics


def test_the_process_is_left_as_it_was(recipe: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    from accelerate.state import PartialState
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_warning()
    torch.manual_seed(7)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    expected = torch.rand(3, generator=torch.Generator().manual_seed(7))
    capsys.readouterr()
    ptft_dist.train(recipe, quiet=True)
    assert capsys.readouterr().err == ""
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert transformers_logging.get_verbosity() == logging.WARNING
    assert torch.equal(torch.rand(3), expected)
    assert PartialState._shared_state == {}
    assert not torch.are_deterministic_algorithms_enabled()
    assert not logging.getLogger("ptft").handlers


def test_it_raises_what_is_wrong_and_works_again(recipe: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"optim\.lrr: unknown key; did you mean optim\.lr"):
        ptft_dist.train(recipe, {"optim.lrr": 1})
    with pytest.raises(DataError, match="no such file"):
        ptft_dist.train(recipe, {"data.train": [{"path": str(tmp_path / "nothing.txt")}]})
    ptft_dist.train(recipe)
    with pytest.raises(CheckpointError, match=r"optim\.lr: 0\.01 in the checkpoint, 0\.5 now"):
        ptft_dist.train(recipe, {"optim.lr": 0.5})
    assert ptft_dist.train(recipe).status == "finished"


def test_it_works_in_a_thread_where_the_stop_file_stops_it(recipe: dict[str, Any], tmp_path: Path) -> None:
    results: list[ptft_dist.Result] = []
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "stop").touch()
    thread = threading.Thread(target=lambda: results.append(ptft_dist.train(recipe)))
    thread.start()
    thread.join(120)
    assert results[0].status == "stopped"
    assert "the file" in results[0].reason
    assert not (run_dir / "stop").exists()
    assert ptft_dist.train(recipe).status == "finished"


def test_an_evaluation_needs_no_optimizer_and_writes_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    """The same scores as the last evaluation of the training, from the exported model."""
    trained = ptft_dist.train(recipe)
    before = sorted((tmp_path / "run").rglob("*"))
    scores = ptft_dist.evaluate(recipe)
    assert scores == pytest.approx(trained.metrics, rel=1e-6)
    assert sorted((tmp_path / "run").rglob("*")) == before
    with pytest.raises(RecipeError, match=r"data\.validation: not set, so there are no rows to evaluate"):
        ptft_dist.evaluate(recipe | {"eval": {}}, {"data.validation": None})


@pytest.mark.parametrize(("changes", "rows"), [({}, MICRO_SIZE), ({"eval.micro_size": 5}, 5)])
def test_evaluations_have_micro_batches_of_their_own_size(
    recipe: dict[str, Any], changes: dict[str, Any], rows: int
) -> None:
    """eval.micro_size; the default is batch.micro_size."""
    with libraries_restored():
        session = Session(ptft_dist.load_recipe(recipe, changes), place())
        session.start(training=False)
        assert session.validation is not None
        assert max(len(part[0]) for part in session.validation.parts) == rows


def test_prepare_gives_the_report(recipe: dict[str, Any]) -> None:
    prepared = ptft_dist.prepare(recipe)
    assert len(prepared.train) == prepared.report.train.rows > 0


def test_the_package_imports_nothing_heavy() -> None:
    probe = (
        "import sys, ptft_dist; ptft_dist.load_recipe('clm'); assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", probe], check=True, env=environment())
