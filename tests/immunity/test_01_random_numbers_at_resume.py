"""1: random numbers are restored at the wrong moment, or an error in restoring them is ignored.

Here there is no generator state to restore: what a micro-batch draws is a function of its place in the run. Whole runs
with dropout, killed and resumed, are in distributed/test_kill.py.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from in_process import make_recipe, make_store, make_trainer, ragged

from ptft_dist.checkpoint.checkpoint import read_checkpoint
from ptft_dist.engine import Engine, reset_accelerate


def train(folder: Path, dropout: float = 0.5, resume_at: int | None = None, draws: int = 0) -> list[float]:
    """The losses of four updates; those after `resume_at` are from a trainer that resumed from its checkpoint."""
    network = {"config": {"attention_dropout": dropout}}
    recipe = make_recipe(model=network, save={"every": 2, "keep": None})
    store = make_store(folder / f"store-{len(list(folder.glob('store-*')))}", ragged(30))
    with make_trainer(folder, store, recipe) as (trainer, kept):
        if resume_at is not None:
            trainer.restore(read_checkpoint(folder / f"checkpoints/step-{resume_at:08d}"))
            trainer.checkpoints.set_aside_after(resume_at, lambda _: None)
        torch.rand(draws)
        trainer.fit()
        return [float(row["loss"]) for row in kept.rows]


def test_a_resumed_run_drops_the_same(tmp_path: Path) -> None:
    whole = train(tmp_path)
    assert train(tmp_path, resume_at=2) == whole[2:]
    assert train(tmp_path, resume_at=2, draws=1000) == whole[2:]  # whatever was drawn before
    assert train(tmp_path / "other", dropout=0.0) != whole  # there is something to drop


@pytest.mark.parametrize(("dropout", "different"), [(0.5, 4), (0.0, 1)])
def test_every_update_drops_other_values(tmp_path: Path, dropout: float, different: int) -> None:
    """One row and constant weights, so that only dropout can change the losses of four updates."""
    recipe = make_recipe(
        model={"config": {"attention_dropout": dropout}},
        batch={"global_size": 1, "micro_size": 1},
        optim={"lr": 1e-30},
    )
    with make_trainer(tmp_path, make_store(tmp_path / "store", [32]), recipe) as (trainer, kept):
        trainer.fit()
    assert len({row["loss"] for row in kept.rows}) == different


def test_every_place_draws_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine("fp32", None)
    try:
        drawn = {}
        places = list(itertools.product((0, 1, 2**62), (0, 1, 2, 1000), (0, 1, 7), (0, 1, 2)))
        for seed, step, rank, micro_step in places:
            monkeypatch.setattr(engine, "rank", rank)
            engine.seed(seed, step, micro_step)
            drawn[seed, step, rank, micro_step] = tuple(torch.rand(4).tolist())
        assert len(set(drawn.values())) == len(places)
        for place in reversed(places):  # in another order, and after other draws
            torch.rand(3)
            monkeypatch.setattr(engine, "rank", place[2])
            engine.seed(place[0], place[1], place[3])
            assert tuple(torch.rand(4).tolist()) == drawn[place]
    finally:
        reset_accelerate()


@pytest.mark.parametrize("lost", ["model.safetensors", "optimizer.safetensors", "optimizer.json"])
def test_what_cannot_be_restored_is_an_error(tmp_path: Path, lost: str) -> None:
    train(tmp_path)
    (tmp_path / "checkpoints/step-00000002" / lost).unlink()
    with pytest.raises(FileNotFoundError, match=lost):
        train(tmp_path, resume_at=2)
