"""The steps of data.steps that edit, for rows that are no training or validation data: those of `ptft predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptft_dist.config.cleaning import ExactDedupStep, NearDedupStep
from ptft_dist.config.recipe import Recipe
from ptft_dist.data.cache import HashMemo
from ptft_dist.data.cleaning.registry import text_step
from ptft_dist.data.cleaning.stage import Named, Stage
from ptft_dist.data.cleaning.tally import Tally
from ptft_dist.data.encoder import LeftOut
from ptft_dist.data.formats import Record


class Edits:
    """Changes the texts of single rows like those of validation sources. No row is compared with another one."""

    def __init__(self, recipe: Recipe, base: Path, roles: tuple[str, ...]) -> None:
        """roles: the columns with texts. Raises RecipeError or DataError, see `text_step`."""
        steps = [
            Named(step.name, text_step(step.settings, base), None)
            for step in recipe.data.steps
            if step.edits and not isinstance(step.settings, ExactDedupStep | NearDedupStep)
        ]
        self._stage = Stage(roles, tuple(steps))

    def contents(self, memo: HashMemo) -> list[Any]:
        """What affects the results besides the recipe, such as the module of a custom step."""
        steps = [named.step for named in self._stage.steps]
        return [step.contents(memo) for step in steps if hasattr(step, "contents")]

    def __call__(self, record: Record) -> Record:
        """The record after the steps.

        Raises:
            LeftOut: a step removes the whole text, or the row.
        """
        tally = Tally()
        edited = self._stage.clean(record, "validation", [tally] * len(self._stage.steps))
        if edited is None:
            raise LeftOut(f"data.steps: {next(iter(tally.dropped))}")
        return edited
