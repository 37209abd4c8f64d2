"""Rewards of whole responses: reward models, reward functions, and how they become one score."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptft_dist.config.rollouts import RewardSource
from ptft_dist.errors import DataError, PtftError, RecipeError

RewardFunction = Callable[..., Sequence[float | None]]
_NUMBER = re.compile(r"(?:(?<![\w)])-)?[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
"""A hyphen after a digit, a letter or a closing parenthesis is no sign: 5-10."""


def load_function(source: RewardSource, key: str, base: Path) -> RewardFunction:
    """The reward function that a recipe names.

    Args:
        key: the recipe's key, for messages.
        base: the recipe's directory, where modules are looked for too.

    Raises:
        RecipeError: there is no such function, or it cannot be called as one.
    """
    assert source.function is not None
    module_name, _, name = source.function.replace(":", ".").rpartition(".")
    if not module_name:
        raise RecipeError(f"{key}: {source.function!r} names no module; write it as module:function")
    try:
        module = _import(module_name, base)
    except Exception as error:
        raise RecipeError(f"{key}: {module_name} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"{key}: {module_name} has no function {name!r}")
    if source.make:
        try:
            function = function(**source.arguments)
        except Exception as error:
            raise RecipeError(f"{key}: {name}(**arguments) failed: {type(error).__name__}: {error}") from error
    elif source.arguments:
        function = functools.partial(function, **source.arguments)
    if inspect.iscoroutinefunction(function) or not callable(function):
        raise RecipeError(f"{key}: {name} is not an ordinary function")
    return function


def _import(name: str, base: Path) -> Any:
    """A module: a file beside the recipe, or one that Python finds."""
    file = base / (name.replace(".", "/") + ".py")
    if not file.is_file():
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"_ptft_rewards_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def call_function(
    function: RewardFunction,
    key: str,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    ids: Sequence[list[int]],
    columns: Mapping[str, Sequence[Any]],
) -> list[float | None]:
    """The rewards of completions, checked.

    Args:
        key: the recipe's key, for messages.
        prompts, completions: texts, or lists of messages.
        ids: token ids of the completions.
        columns: the other columns of the prompts' rows.

    Raises:
        RecipeError: the function raised an error, or returned something else than one finite number or None for each
            completion.
    """
    try:
        returned = function(completions=completions, prompts=prompts, completion_ids=ids, **columns)
        rewards = [None if value is None else float(value) for value in returned]
    except PtftError:
        raise
    except Exception as error:
        raise RecipeError(f"{key}: the reward function failed: {type(error).__name__}: {error}") from error
    if len(rewards) != len(completions):
        raise RecipeError(
            f"{key}: the reward function returned {len(rewards)} rewards for {len(completions)} completions; it must "
            "return one number, or None, for each"
        )
    for value, completion in zip(rewards, completions, strict=True):
        if value is not None and not math.isfinite(value):
            raise RecipeError(f"{key}: the reward function returned {value} for the completion {completion!r}")
    return rewards


def mixed(rewards: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]) -> np.ndarray:
    """The score of each response: the weighted sum of its rewards, without those that are None: fp32 [N].

    Raises:
        DataError: a response has no reward at all.
    """
    scores = []
    for each in zip(*rewards.values(), strict=True):
        given = [(weights[name], value) for name, value in zip(rewards, each, strict=True) if value is not None]
        if not given:
            raise DataError(
                f"rewards: none of {', '.join(rewards)} gave a reward to a response. A function may return None only "
                "where another one gives a number"
            )
        scores.append(sum(weight * value for weight, value in given))
    return np.array(scores, np.float32)


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far (Chan et al. 1979), which normalization needs and a resume restores."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared differences from the mean."""

    def add(self, scores: np.ndarray) -> None:
        n, mean = len(scores), float(scores.astype(np.float64).mean())
        delta, total = mean - self.mean, self.count + n
        self.squares += float(((scores - mean) ** 2).sum()) + delta**2 * self.count * n / total
        self.mean, self.count = self.mean + delta * n / total, total

    @property
    def deviation(self) -> float:
        """The unbiased standard deviation; 1 before there are two scores."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 and self.squares > 0 else 1.0


def shaped(
    scores: np.ndarray,
    lengths: np.ndarray,
    ended: np.ndarray,
    *,
    moments: RunningMoments | None = None,
    clip: float | None = None,
    missing_eos_penalty: float | None = None,
    length_target: int | None = None,
    length_penalty: float | None = None,
) -> np.ndarray:
    """The scores that are learned from: normalized, clipped, then lowered by penalties: fp32 [N].

    Args:
        lengths: response tokens [N].
        ended: whether the response has an EOS [N].
        moments: normalize with the moments of all scores so far, to which these are added.
        clip: to [-clip, clip].
        missing_eos_penalty: subtracted from the score of a response without EOS.
        length_target, length_penalty: the penalty is subtracted for each token above the target.
    """
    if moments is not None:
        moments.add(scores)
        scores = (scores - moments.mean) / (moments.deviation + 1e-8)
    if clip is not None:
        scores = scores.clip(-clip, clip)
    if missing_eos_penalty is not None:
        scores = scores - missing_eos_penalty * ~ended
    if length_target is not None and length_penalty is not None:
        scores = scores - length_penalty * np.maximum(lengths - length_target, 0)
    return scores.astype(np.float32)


def final_number(completions: Sequence[Any], answer: Sequence[Any], **_columns: Any) -> list[float]:
    """1 where the last number of the completion equals the column `answer`, else 0; as GSM8K is scored.

    Thousands separators and a leading currency sign are ignored. `answer` may be GSM8K's solution, whose number follows
    "####".
    """
    pairs = ((_last_number(_text(c)), _last_number(str(a))) for c, a in zip(completions, answer, strict=True))
    return [float(found is not None and found == right) for found, right in pairs]


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(re.sub(r"[,$€£]", "", found[-1])) if found else None


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)
