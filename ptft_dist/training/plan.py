"""Which rows each update of a run reads, or each rollout, from the sizes in the recipe and the rows that there are."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.resolve import BatchShape
from ptft_dist.data.order import Plan, make_plan
from ptft_dist.data.store import Store
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.training.rows import TrainingRows

MOST_EPOCHS = 1_000_000
"""The maximum of train.epochs, so that the table of a run's updates fits into memory."""


def plan_run(recipe: Recipe, shape: BatchShape, store: Store, training: TrainingRows) -> Plan:
    """The rows of all updates; for a task with rollouts, the prompts of all rollouts.

    Args:
        store: that of `training`, or one with the same rows and more columns.
        training: how the order of rows is drawn.

    Raises:
        DataError: the data have too few rows for one update or rollout.
        RecipeError: train.max_tokens are too many epochs.
    """
    if (prompts := recipe.settings.rollout_prompts) is not None:
        return _plan_of_rollouts(recipe, shape, store, training.sizes, prompts)
    train, rows, tokens = recipe.train, len(store), store.tokens
    if (shape.global_tokens or 0) > tokens:
        raise DataError(
            f"batch.global_tokens: one update needs {shape.global_tokens:,} tokens, the training data have "
            f"{tokens:,}: lower batch.global_tokens, or add data"
        )
    if train.max_tokens is not None and train.max_tokens > MOST_EPOCHS * tokens:
        raise RecipeError(
            f"train.max_tokens: {train.max_tokens:,} is more than {MOST_EPOCHS:,} epochs of the training data's "
            f"{tokens:,} tokens: lower it"
        )
    if shape.global_size is not None and rows < shape.global_size:
        raise DataError(
            f"batch: one update needs {shape.global_size} rows, the training data have {rows}. Lower "
            "batch.global_size (or global_tokens) or data.max_length, or add data"
        )
    plan = make_plan(
        training.sizes,
        store.lengths,
        train.seed,
        periods=training.periods,
        global_size=shape.global_size,
        global_tokens=shape.global_tokens,
        max_steps=train.max_steps,
        epochs=train.epochs,
        max_tokens=train.max_tokens,
        cache=store.path.parent / ("plans" if len(training.sizes) == 1 else f"plans-{store.path.name}"),
    )
    last = plan.positions(plan.total_steps - 1)[1]
    if training.end is not None and last > training.end:
        raise DataError(_used_up(recipe, shape, last, training.end))
    return plan


def _used_up(recipe: Recipe, shape: BatchShape, needed: int, end: int) -> str:
    """The message for a run that needs more rows than data.mixing.max_epochs allows. end: see `TrainingRows`."""
    schedule = recipe.data.mixing.schedule if recipe.data.mixing is not None else None
    if schedule is None:
        return (
            f"data.mixing.max_epochs: the run needs {needed:,} rows, and the sources give {end:,} until all are used "
            "up. Train for fewer updates, raise max_epochs, or add data"
        )
    assert shape.global_size is not None
    update = end // shape.global_size
    number = bisect_right([period.from_step for period in schedule], update) - 1
    return (
        f"data.mixing.max_epochs: the run needs {needed:,} rows, and after {end:,} of them (update {update}) the "
        f"sources with a weight above 0 in schedule.{number} are used up. Raise max_epochs, add data to them, or "
        "change the schedule so that it reads others by then"
    )


def _plan_of_rollouts(recipe: Recipe, shape: BatchShape, store: Store, sizes: Sequence[int], prompts: int) -> Plan:
    """The prompts of each rollout; total_steps is the number of updates. All rollouts have the same size."""
    train, rows = recipe.train, len(store)
    assert shape.global_size is not None
    if rows < prompts:
        raise DataError(
            f"{recipe.task}.prompts: a rollout needs {prompts} prompts, the training data have {rows}. Lower it, or "
            "add data"
        )
    updates = recipe.settings.updates_of_rollout(shape.global_size)
    total = train.max_steps or max(1, int((train.epochs or 1) * rows / prompts)) * updates
    return make_plan(sizes, store.lengths, train.seed, global_size=prompts, max_steps=total)
