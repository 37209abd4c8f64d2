"""The training loop with phases of several updates, and updates without any label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from in_process import make_recipe, make_store, make_trainer, ragged

from ptft_dist.checkpoint.checkpoint import read_checkpoint
from ptft_dist.tasks.protocol import Batch
from ptft_dist.training.batches import PhaseContext, SupervisedBatches
from ptft_dist.training.stopping import StopRequest
from ptft_dist.training.trainer import UpdateReport

PHASE = 16


class Phases:
    """16 updates a phase, from the groups of a supervised source; a phase may end early, at a loss below `enough`."""

    def __init__(self, inner: SupervisedBatches, enough: float = 0.0) -> None:
        self.inner, self.enough, self.phases, self.observed = inner, enough, 0, list[UpdateReport]()
        self.contexts: list[int] = []

    def next_phase(self, context: PhaseContext) -> Iterator[Sequence[Batch]]:
        self.contexts.append(context.step)
        self.phases += 1
        for _ in range(PHASE):
            yield from self.inner.next_phase(context)
            if self.observed[-1].loss < self.enough:
                return

    metrics: ClassVar[dict[str, float]] = {}

    def take_samples(self) -> list[dict[str, Any]]:
        return []

    def observe(self, report: UpdateReport) -> None:
        self.observed.append(report)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "phases": self.phases}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.phases = state["phases"]


def recipe(**changes: Any) -> Any:
    return make_recipe(train={"max_steps": 40}, save={"every": 5, "keep": None}, **changes)


def test_saves_come_at_the_ends_of_phases_and_the_last_phase_is_short(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", ragged(60))
    with make_trainer(tmp_path, store, recipe()) as (trainer, kept):
        source = trainer.batches = Phases(trainer.batches)  # type: ignore[arg-type,assignment]
        assert trainer.fit().finished
        assert [report.step for report in source.observed] == [row["step"] for row in kept.rows] == [*range(1, 41)]
        assert source.contexts == [0, 16, 32]
        saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
        # A multiple of 5 was crossed in each of the first two phases; the third ends with the run.
        assert saved == ["step-00000016", "step-00000032", "step-00000040"]
        assert read_checkpoint(tmp_path / "checkpoints/step-00000032").manifest["batches"] == {
            "inner": {"step": 32},
            "phases": 2,
        }


def test_phases_change_no_update(tmp_path: Path) -> None:
    """The same losses as with phases of one update, and as a run resumed in between."""
    store, losses = make_store(tmp_path / "store", ragged(60)), {}
    for name in ("one", "many", "resumed"):
        with make_trainer(tmp_path / name, store, recipe()) as (trainer, kept):
            if name != "one":
                trainer.batches = Phases(trainer.batches)  # type: ignore[arg-type,assignment]
            if name == "resumed":
                trainer.restore(read_checkpoint(tmp_path / "many/checkpoints/step-00000016"))
            trainer.fit()
            losses[name] = [row["loss"] for row in kept.rows]
    assert losses["one"] == losses["many"]
    assert losses["resumed"] == losses["many"][16:]


def test_a_source_sees_each_report_before_it_gives_the_next_group(tmp_path: Path) -> None:
    """With a target that every loss meets, each phase ends after its first update."""
    store = make_store(tmp_path / "store", ragged(60))
    with make_trainer(tmp_path, store, recipe()) as (trainer, _):
        source = trainer.batches = Phases(trainer.batches, enough=1e9)  # type: ignore[arg-type,assignment]
        trainer.fit()
        assert source.contexts == [*range(40)]


def test_a_stop_waits_for_the_end_of_the_phase(tmp_path: Path) -> None:
    class Asked(StopRequest):
        looks = 0

        def requested(self) -> bool:
            self.looks += 1
            self.reason = "a test"
            return self.looks > 3  # in update 3; the first look is before it

    store = make_store(tmp_path / "store", ragged(60))
    with make_trainer(tmp_path, store, recipe(), Asked(None)) as (trainer, kept):
        trainer.batches = Phases(trainer.batches)  # type: ignore[arg-type,assignment]
        outcome = trainer.fit()
        assert (outcome.finished, outcome.reason) == (False, "a test")
        assert [row["step"] for row in kept.rows] == [*range(1, 17)]
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000016"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_update_in_which_nothing_counts_moves_no_weight(tmp_path: Path, optimizer: str) -> None:
    """Not even by weight decay, nor by the momentum of earlier updates."""
    store = make_store(tmp_path / "store", ragged(60))
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    ours = make_recipe(optim={"name": optimizer, "weight_decay": 0.5, **momentum}, train={"max_steps": 4})
    with make_trainer(tmp_path, store, ours) as (trainer, _):
        group = trainer.batches.dataset[0]  # type: ignore[attr-defined]
        trainer.update(group)
        before = {name: p.clone() for name, p in trainer.engine.model.named_parameters()}
        nothing = [
            replace(batch, count=0, inputs=batch.inputs | {"targets": torch.full_like(batch.inputs["targets"], -100)})
            for batch in group
        ]
        report = trainer.update(nothing)
        assert (report.count, report.lr, report.loss) == (0, 0.0, 0.0)
        assert all(torch.equal(p, before[name]) for name, p in trainer.engine.model.named_parameters())
        trainer.update(group)
        assert not all(torch.equal(p, before[name]) for name, p in trainer.engine.model.named_parameters())
