"""The search of a sweep: which keys of a recipe are varied, how values are chosen, and when a bad trial is stopped.

method: tpe
trials: 20
search:
  optim.lr: {log: [1e-5, 1e-2]}
  optim.weight_decay: {choice: [0.0, 0.01, 0.1]}
prune: {after: 2}
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.api import load_recipe
from ptft_dist.config.load import Loaded, read_section
from ptft_dist.config.section import Section, exactly_one, only_with
from ptft_dist.config.shipped import find_shipped
from ptft_dist.errors import RecipeError

Int = int  # within Range, `int` is the key
FIXED = ("run_dir", "task", "eval.metric", "eval.goal", "data.validation", "data.folds", "data.fold")
"""Keys that cannot be searched: the values of their trials could not be compared, or would share a directory."""


class Range(Section):
    """The values of one key: one of these four."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    """One of these values, of any type."""
    log: tuple[float, float] | None = None
    """A number between these two, uniform in its logarithm."""
    uniform: tuple[float, float] | None = None
    """A number between these two."""
    int: tuple[Int, Int] | None = None
    """A whole number from the first to the second, both included."""
    step: Annotated[Int, Field(ge=1)] = 1
    """`int`: the distance between two values."""

    @model_validator(mode="after")
    def _check(self) -> Range:
        exactly_one(self, "choice", "log", "uniform", "int")
        only_with(self, ("step",), self.int is not None, "int")
        if self.ends is not None and self.ends[0] >= self.ends[1]:
            raise ValueError(f"the first number must be below the second, got {list(self.ends)}")
        if len({json.dumps(each) for each in self.choice or ()}) < len(self.choice or ()):
            raise ValueError("choice: a value is given twice")
        if self.log is not None and self.log[0] <= 0:
            raise ValueError(f"log needs numbers above 0, got {list(self.log)}")
        if self.int is not None and (self.int[1] - self.int[0]) % self.step:
            raise ValueError(f"step: {self.step} does not lead from {self.int[0]} to {self.int[1]}")
        return self

    @property
    def ends(self) -> tuple[float, float] | None:
        """The smallest and the largest value; None for a choice."""
        return self.log or self.uniform or self.int

    @property
    def values(self) -> Sequence[Any] | None:
        """All values in order; None if they cannot be listed."""
        if self.int is not None:
            return range(self.int[0], self.int[1] + 1, self.step)
        return self.choice

    @property
    def samples(self) -> Sequence[Any]:
        """Values that a recipe must accept: the choices, or both ends."""
        return self.choice if self.choice is not None else self.ends or ()


class Pruning(Section):
    """Stops trials whose evaluations are worse than those of other trials."""

    method: Literal["median", "hyperband"] = "median"
    """`median`: a trial whose best evaluation so far is worse than the median of finished trials at the same
    evaluation. `hyperband`: successive halving in several brackets (Li et al. 2018)."""
    after: PositiveInt = 1
    """No trial is stopped before this many evaluations."""
    startup: Annotated[int, Field(ge=1)] | None = None
    """`median`: no trial is stopped before this many have finished. Default: 5."""

    @model_validator(mode="after")
    def _check(self) -> Pruning:
        only_with(self, ("startup",), self.method == "median", "prune.method: median")
        return self


class Search(Section):
    """A search file."""

    method: Literal["grid", "random", "tpe"]
    """`grid`: all combinations. `random`: independent draws. `tpe`: tree-structured Parzen estimator, which learns from
    finished trials (Bergstra et al. 2011)."""
    trials: PositiveInt | None = None
    """Number of trials. `grid`: leave it out."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the draws. The seed of the training is train.seed."""
    metric: str | None = None
    """The metric to compare. Default: eval.metric of the recipe."""
    goal: Literal["min", "max"] | None = None
    """Default: eval.goal of the recipe, or what fits the metric."""
    startup: PositiveInt | None = None
    """`tpe`: so many trials are drawn at random first. Default: 10."""
    search: Annotated[dict[str, Range], Field(min_length=1)]
    """Dotted key of the recipe -> its values."""
    prune: Pruning | None = None
    """Stop bad trials early. Default: every trial runs to its end."""

    @model_validator(mode="after")
    def _check(self) -> Search:
        only_with(self, ("startup",), self.method == "tpe", "method: tpe")
        if self.method != "grid":
            if self.trials is None:
                raise ValueError(f"trials: required with method: {self.method}")
            return self
        ranges = [key for key, each in self.search.items() if each.values is None]
        if ranges:
            raise ValueError(f"method: grid needs values to list; use choice or int for {', '.join(ranges)}")
        if self.trials not in (None, self.grid_size):
            raise ValueError(f"trials: the grid has {self.grid_size} combinations; remove this key")
        return self

    @property
    def grid_size(self) -> int:
        return math.prod(len(each.values or ()) for each in self.search.values())

    @property
    def count(self) -> int:
        """The number of trials."""
        return self.grid_size if self.trials is None else self.trials

    def combination(self, number: int) -> dict[str, Any]:
        """The values of a trial of a grid; the last key changes fastest."""
        values = itertools.product(*(each.values or () for each in self.search.values()))
        return dict(zip(self.search, next(itertools.islice(values, number, None)), strict=True))

    def overrides(self, loaded: Loaded) -> list[str]:
        """What every trial sets in the recipe."""
        found: dict[str, Any] = {} if self.metric is None else {"eval.metric": self.metric}
        if self.goal is not None or self.metric not in (None, loaded.recipe.eval.metric):
            found["eval.goal"] = self.goal
        return words(found)


def words(values: Mapping[str, Any]) -> list[str]:
    """Values of keys as overrides, such as `optim.lr=0.001`."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


@dataclass(frozen=True)
class SearchFile:
    """A valid search, and where its keys are."""

    search: Search
    path: Path
    lines: Mapping[str, int]
    """Key of the recipe -> its line."""


def read_search(name: str) -> SearchFile:
    """Read a search. Raises RecipeError, which lists all mistakes.

    Args:
        name: a file, or the name of a shipped search.
    """
    path = find_shipped("sweeps", name, ".yaml")
    search, document = read_section(path, Search, "search")
    return SearchFile(search, path, {key: document.line(("search", key)) for key in search.search})


def check_search(file: SearchFile, recipe: str, overrides: Sequence[str]) -> tuple[Loaded, list[str]]:
    """Compare a search with its recipe.

    All combinations of a grid are tried; else each value of a choice and both ends of a range, with the first values
    of the other keys.

    Returns:
        The recipe with what every trial sets, and this as overrides.

    Raises:
        RecipeError: the recipe is wrong, or does not accept a key or a value of the search. Lists all mistakes.
    """
    loaded = load_recipe(recipe, overrides)
    if loaded.recipe.data.all_folds:
        raise RecipeError("data.folds: a trial of a sweep is one run. Choose a fold with data.fold, or use validation")
    if not loaded.recipe.validated:
        raise RecipeError("data.validation: required by a sweep, which compares its trials by a metric of these rows")
    if file.search.prune is not None and loaded.recipe.eval.every is None:
        raise RecipeError(f"{file.path}: prune: has no effect here: it needs eval.every in the recipe")
    given = [*overrides, *file.search.overrides(loaded)]
    try:
        loaded = load_recipe(recipe, given)
    except RecipeError as error:
        raise RecipeError(str(error).replace("command line: eval.", f"{file.path}: ")) from None
    if mistakes := dict.fromkeys(_mistakes(file, recipe, given)):
        raise RecipeError("\n".join(mistakes))
    return loaded, given


def _mistakes(file: SearchFile, recipe: str, overrides: Sequence[str]) -> Iterator[str]:
    """All of them, at the lines of the search file; some more than once."""
    searched = file.search.search
    fixed = [
        key for key in searched for each in FIXED if _is_within(_plain(key), each) or _is_within(each, _plain(key))
    ]
    for key in fixed:
        yield f"{file.path}:{file.lines[key]}: search.{key}: a sweep cannot vary this key"
    for given in dict.fromkeys(word.partition("=")[0] for word in overrides):
        for key in (key for key in searched if _is_within(_plain(given), _plain(key))):
            where = f"{file.path}:{file.lines[key]}: search.{key}"
            yield f"command line: {given}: has no effect here: every trial has its own value, see {where}"
    for values in _tries(file.search):
        tried = words({key: value for key, value in values.items() if key not in fixed})
        try:
            load_recipe(recipe, [*overrides, *tried])
        except RecipeError as error:
            for text in str(error).splitlines():
                where, _, rest = text.partition(": ")
                at = rest.partition(":")[0]
                key = max((key for key in values if f"{at}.".startswith(f"{key}.")), key=len, default="")
                known = where == "command line" and key
                yield (
                    f"{file.path}:{file.lines[key]}: search.{rest}"
                    if known
                    else f"{file.path}: with {' '.join(tried)}: {text}"
                )


def _plain(key: str) -> str:
    """A key with the indices of lists between dots: data.train[0].path is data.train.0.path."""
    return re.sub(r"\[(\d+)\]", r".\1", key.strip())


def _is_within(key: str, section: str) -> bool:
    return f"{key}.".startswith(f"{section}.")


def _tries(search: Search) -> Iterator[dict[str, Any]]:
    """Values of all keys, such as those of a trial."""
    if search.method == "grid":
        yield from (search.combination(number) for number in range(search.count))
        return
    first = {key: each.samples[0] for key, each in search.search.items()}
    yield first
    for key, each in search.search.items():
        yield from ({**first, key: value} for value in each.samples[1:])
