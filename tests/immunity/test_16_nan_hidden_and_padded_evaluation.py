"""16: NaN is hidden by a filter of the log; evaluation counts the padded duplicates of its last batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import make_recipe, make_store, make_task, make_trainer, ragged

from ptft_dist.errors import NonFiniteLossError
from ptft_dist.tasks.protocol import LossOut
from ptft_dist.training.batches import Shape
from ptft_dist.training.validation import Validation


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_it_stops_before_the_weights_move(tmp_path: Path, where: str, bad: float) -> None:
    recipe = make_recipe(save={"every": 1})
    with make_trainer(tmp_path, make_store(tmp_path / "store", ragged(30)), recipe) as (trainer, kept):
        healthy = trainer.task.loss

        def sick(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
            out = healthy(model, inputs)
            if trainer.progress.step < 2:
                return out
            if where == "loss":
                return LossOut(out.loss_sum * bad, {})
            parameter = next(model.parameters())
            parameter.register_hook(lambda gradient: gradient * bad)  # the loss itself stays a number
            return out

        trainer.task.loss = sick  # type: ignore[method-assign]
        at_two: dict[str, torch.Tensor] = {}
        save = trainer.save

        def remember(**kwargs: Any) -> None:
            at_two.update({name: value.clone() for name, value in trainer.engine.model.state_dict().items()})
            save(**kwargs)

        trainer.save = remember  # type: ignore[method-assign]
        with pytest.raises(NonFiniteLossError, match=r"update 3 is (nan|inf); nothing was saved after it"):
            trainer.fit()
        assert [row["step"] for row in kept.rows] == [1, 2]
        assert all(torch.equal(value, at_two[name]) for name, value in trainer.engine.model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000002"]


def test_an_overflowing_validation_row_is_said_before_scores_are_computed(tmp_path: Path) -> None:
    """scikit-learn's correlations raise at NaN; and the checkpoint of the evaluated update is complete."""
    recipe = make_recipe(save={"every": 2}, data={"validation": 0.1}, eval={"every": 2})
    store = make_store(tmp_path / "store", ragged(30))
    with make_trainer(tmp_path, store, recipe) as (trainer, _):
        trainer.validation = Validation(
            store, Shape(0, 1, 3, None, group_by_length=True), trainer.task.collate, None, ""
        )
        healthy = trainer.task.evaluate

        def sick(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
            out = healthy(model, inputs)
            return out._replace(loss_sum=out.loss_sum * float("inf"))

        def scores(*_args: Any) -> Any:
            raise ValueError("Input contains NaN")

        trainer.task.evaluate, trainer.task.scores = sick, scores  # type: ignore[method-assign]
        with pytest.raises(
            NonFiniteLossError, match=r"after update 2: the validation loss is inf\. .*data\.validation"
        ):
            trainer.fit()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro", [{"micro_size": 2}, {"micro_size": None, "micro_tokens": 40}], ids=str)
@pytest.mark.parametrize("total", [13, 2])
def test_each_row_is_evaluated_once(tmp_path: Path, total: int, ranks: int, micro: dict[str, Any]) -> None:
    """13 rows do not divide evenly; with 2 rows, some ranks get a dummy batch that counts nothing."""
    recipe = make_recipe(batch={"global_size": 24} | micro, data={"validation": 0.1}, eval={"every": 1})
    store, task = make_store(tmp_path / "store", ragged(total)), make_task(recipe)
    rows: Counter[int] = Counter()
    count, passes = 0, set()
    for rank in range(ranks):
        layout = Shape(rank, ranks, recipe.batch.micro_size, recipe.batch.micro_tokens, True)
        evaluation = Validation(store, layout, task.collate, None, "made")
        batches = list(evaluation.batches())
        passes.add(len(batches))
        for batch in batches:
            count += batch.count
            labelled = (batch.inputs["targets"] != -100).any(1)
            rows.update(batch.inputs["input_ids"][labelled, 0].tolist())
    assert rows == Counter(range(total))
    assert count == sum(length - 1 for length in ragged(total))
    assert len(passes) == 1  # or a rank would wait for another in the middle


def test_predictions_are_scored_in_the_order_of_the_rows(tmp_path: Path) -> None:
    """Evaluated from long to short; pieces of a sentence are put together in the order in which they are scored."""
    store = make_store(tmp_path / "store", ragged(40))
    scored: list[tuple[int, int]] = []

    class FirstTokens:
        """Predicts the first token of each row, which is the row's number."""

        def evaluate(self, _model: Any, inputs: dict[str, torch.Tensor]) -> LossOut:
            return LossOut(torch.zeros(()), {}, inputs["input_ids"][:, 0])

        def predictions(self, output: torch.Tensor) -> list[int]:
            return output.tolist()

        def scores(self, predictions: Mapping[int, int], _row: Any) -> tuple[dict[str, float], list[Any]]:
            scored.extend(predictions.items())
            return {}, []

        def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
            return totals

    with make_trainer(tmp_path, store, make_recipe()) as (trainer, _):
        validation = Validation(store, Shape(0, 1, 3, None, group_by_length=True), trainer.task.collate, None, "data")
        assert np.concatenate([part[0] for part in validation.parts]).tolist() != list(range(40))
        assert validation.score(trainer.engine, FirstTokens()) is not None  # type: ignore[arg-type]
    assert scored == [(row, row) for row in range(40)]
