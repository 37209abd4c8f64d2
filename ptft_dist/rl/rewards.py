"""Rewards of whole responses: reward models, reward functions, and how they become one score."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import math
import re
import reprlib
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from ptft_dist.config.rollouts import RewardSource
from ptft_dist.errors import DataError, PtftError, RecipeError

RewardFunction = Callable[..., Sequence[float | None]]
_NUMBER = re.compile(r"(?:(?<![\w)])-)?[$€£]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
"""A hyphen after a digit, a letter or a closing parenthesis is no sign: 5-10."""

_LARGEST = float(np.finfo(np.float32).max)


def find_function(source: RewardSource, key: str, base: Path) -> Callable[..., Any]:
    """What a recipe names as `function`: a reward function, or with `make` a function that returns one.

    Args:
        key: the recipe's key, for messages.
        base: the recipe's directory, where modules are looked for too.

    Raises:
        RecipeError: its module cannot be imported, or has no such function.
    """
    assert source.function is not None
    module_name, _, name = source.function.replace(":", ".").rpartition(".")
    if not module_name or not name:
        raise RecipeError(f"{key}: {source.function!r} names no function of a module; write it as module:function")
    file = module_file(source, base)
    try:
        known = file.is_file()
        module = _import_file(module_name, file, file.stat().st_mtime_ns) if known else import_module(module_name)
    except (Exception, SystemExit) as error:  # a script that calls sys.exit would end the run without a message
        raise RecipeError(
            f"{key}: {module_name} cannot be imported: {_described(error, str(file))}. Correct it, or name another "
            f"module: an installed one, or a file in {base.absolute()}"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"{key}: {module_name} has no function {name!r}. Correct the name, or define the function")
    if inspect.iscoroutinefunction(function):
        raise RecipeError(f"{key}: {name} is not an ordinary function. Write `def` instead of `async def`")
    return function


def module_file(source: RewardSource, base: Path) -> Path:
    """Where the module of a function would lie beside the recipe. base: the recipe's directory."""
    assert source.function is not None
    module_name, *_ = source.function.replace(":", ".").rpartition(".")
    return base.absolute() / (module_name.replace(".", "/") + ".py")


def load_function(source: RewardSource, key: str, base: Path) -> RewardFunction:
    """The reward function that a recipe names, with its arguments; see `find_function`.

    Raises:
        RecipeError: there is no such function, or it does not make a reward function.
    """
    function = find_function(source, key, base)
    if not source.make:
        return functools.partial(function, **source.arguments) if source.arguments else function
    try:
        made: Any = function(**source.arguments)
    except Exception as error:
        called = f"{source.function}(**arguments)"
        raise RecipeError(f"{key}: {called} failed: {_described(error)}. Correct it, or `arguments`") from error
    if not callable(made) or inspect.iscoroutinefunction(made):
        raise RecipeError(
            f"{key}: {source.function} returned {made!r} and not a reward function. If it is one itself, remove `make`"
        )
    return made


@functools.lru_cache
def _import_file(name: str, file: Path, _changed: int) -> Any:
    """The module in `file`. It runs once, though several functions may be in it; again when the file has changed."""
    spec = importlib.util.spec_from_file_location(f"_ptft_rewards_{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _described(error: BaseException, file: str | None = None) -> str:
    """Type and message of an error, and the last line of `file` that it passed. Default: the file that was called."""
    frames = traceback.extract_tb(error.__traceback__)
    file = file or next((frame.filename for frame in frames[1:]), None)
    line = next((f" (line {frame.lineno} of {file})" for frame in reversed(frames) if frame.filename == file), "")
    return f"{type(error).__name__}: {error}{line}"


def call_function(
    function: RewardFunction,
    name: str,
    prompts: Sequence[Any],
    completions: Sequence[Any],
    ids: Sequence[list[int]],
    columns: Mapping[str, Sequence[Any]],
) -> list[float | None]:
    """The rewards of completions, checked.

    Args:
        name: the recipe's key and the name of the function, for messages.
        prompts, completions: texts, or lists of messages.
        ids: token ids of the completions.
        columns: the other columns of the prompts' rows.

    Raises:
        RecipeError: the function raised an error, or returned something else than one finite number or None for each
            completion; or a key of its `arguments` is a column too.
    """
    given = {"completions": completions, "prompts": prompts, "completion_ids": ids, **columns}
    fixed = function.keywords if isinstance(function, functools.partial) else {}  # see load_function
    if twice := [key for key in fixed if key in given]:
        raise RecipeError(
            f"{name}: the rows have a column {twice[0]}, and its `arguments` a key of this name. Rename the key, or "
            "leave the column out"
        )
    try:
        returned: Any = function(**given)
        rewards = list(returned) if isinstance(returned, Iterable) else None
    except PtftError:
        raise
    except (Exception, SystemExit) as error:
        arguments = ", ".join(given)
        shape = "" if isinstance(completions[0], str) else ". A completion is a list of messages: each[-1]['content']"
        raise RecipeError(
            f"{name} failed: {_described(error)}. Correct it; its arguments are {arguments}{shape}"
        ) from error
    needs = "A reward function must return a list with one number, or None, for each completion"
    if rewards is None or isinstance(returned, str | bytes | Mapping):
        raise RecipeError(f"{name} returned {reprlib.repr(returned)}. {needs}")
    if len(rewards) != len(completions):
        raise RecipeError(f"{name} returned {len(rewards)} rewards for {len(completions)} completions. {needs}")
    for i, completion in enumerate(completions):
        try:
            rewards[i] = _number(rewards[i])
        except (TypeError, ValueError, RuntimeError):
            raise RecipeError(f"{name} returned {rewards[i]!r} for the completion {completion!r}. {needs}") from None
    return rewards


def _number(value: Any) -> float | None:
    """A reward as a float. Raises ValueError or another error if it is no finite number."""
    if value is None:
        return None
    if isinstance(value, str | bytes) or not math.isfinite(number := float(value)):
        raise ValueError
    return number


def mixed(
    rewards: Mapping[str, Sequence[float | None]], weights: Mapping[str, float], texts: Sequence[str] | None = None
) -> np.ndarray:
    """The score of each response: the weighted sum of its rewards, without those that are None: fp32 [N].

    texts: the responses, for messages.

    Raises:
        DataError: a response has no reward at all.
        RecipeError: a score is too large for fp32.
    """
    scores = []
    for i, each in enumerate(zip(*rewards.values(), strict=True)):
        given = [(weights[name], value) for name, value in zip(rewards, each, strict=True) if value is not None]
        response = "a response" if texts is None else f"the response {texts[i]!r}"
        if not given:
            raise DataError(
                f"rewards: none of {', '.join(rewards)} gave a reward to {response}. A function may return None only "
                "where another one gives a number"
            )
        score = sum(weight * value for weight, value in given)
        if not abs(score) <= _LARGEST:
            raise RecipeError(
                f"rewards: the score of {response} is {score}, too large for fp32. Return smaller numbers from the "
                f"functions ({', '.join(rewards)}), or lower their weights"
            )
        scores.append(score)
    return np.array(scores, np.float32)


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far (Chan et al. 1979), which normalization needs and a resume restores."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared differences from the mean."""

    def add(self, scores: np.ndarray) -> None:
        scores = scores.astype(np.float64)  # squares of large scores overflow in fp32
        n, mean = len(scores), float(scores.mean())
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
