"""The rewards of a recipe: its reward models and functions, and one score for each response from all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ptft_dist.config.rollouts import RewardSource
from ptft_dist.rl.reward_model import Ask, RewardModel
from ptft_dist.rl.rewards import RunningMoments, call_function, load_function, mixed
from ptft_dist.rl.rollout import Phase, Trajectory, judge


def functions_of(sources: Sequence[RewardSource], task: str) -> Iterator[tuple[str, RewardSource]]:
    """The sources that are functions, each with its key in the recipe. task: the section of the recipe."""
    for i, source in enumerate(sources):
        if source.function is not None:
            yield f"{task}.rewards.{i}.function", source


class Rewards:
    """Adds rewards to trajectories. `models` gets each reward model once its network exists."""

    def __init__(self, sources: Sequence[RewardSource], task: str, base: Path) -> None:
        """Load the functions.

        Args:
            task: the section of the recipe, for messages.
            base: the recipe's directory.

        Raises:
            RecipeError: there is no such function.
        """
        self.names = {source.label: f"{key}: {source.function}" for key, source in functions_of(sources, task)}
        """Key and function, for messages."""
        self.weights = {source.label: source.weight for source in sources}
        self.models: dict[str, RewardModel] = {}
        self.functions = {source.label: load_function(source, key, base) for key, source in functions_of(sources, task)}
        self.moments = RunningMoments()

    def ask_models(self, phase: Phase, trajectories: Sequence[Trajectory], policy: Ask) -> None:
        """Add the rewards of the models. policy: calls the trained network, for models that are adapters of it."""
        for name, model in self.models.items():
            judge(phase, trajectories, name, model.texts(trajectories), partial(model.scores, policy), model.padded)

    def call_functions(self, phase: Phase, trajectories: Sequence[Trajectory]) -> None:
        """Add the rewards of the functions.

        The prompts are divided among the ranks, since functions may be slow. All responses to a prompt stay together,
        because a function may compare them.
        """
        if not self.functions:
            return
        ranks = len(phase.processes.gather_objects(None))
        groups = np.cumsum([each.number == 0 for each in trajectories]) - 1
        mine = np.flatnonzero(groups % ranks == phase.processes.rank).tolist()
        self.call_functions_here([trajectories[i] for i in mine])
        own = {i: {name: trajectories[i].rewards[name] for name in self.functions} for i in mine}
        for each, found in zip(trajectories, phase.gathered(own, len(trajectories)), strict=True):
            each.rewards |= found

    def call_functions_here(self, trajectories: Sequence[Trajectory]) -> None:
        """Add the rewards of the functions, on this rank only. Raises RecipeError, see `call_function`."""
        if not trajectories:
            return
        names = sorted({name for each in trajectories for name in each.prompt.columns})
        columns = {name: [each.prompt.columns.get(name) for each in trajectories] for name in names}
        prompts, completions = [each.prompt.text for each in trajectories], [_completion(each) for each in trajectories]
        ids = [each.response.tolist() for each in trajectories]
        for name, function in self.functions.items():
            rewards = call_function(function, self.names[name], prompts, completions, ids, columns)
            for each, reward in zip(trajectories, rewards, strict=True):
                each.rewards[name] = reward

    def mix(self, trajectories: Sequence[Trajectory]) -> np.ndarray:
        """The weighted sum of the rewards of each response: fp32 [N]."""
        rewards = {name: [each.rewards[name] for each in trajectories] for name in self.weights}
        return mixed(rewards, self.weights, [each.text for each in trajectories])

    def averages(self, trajectories: Sequence[Trajectory]) -> dict[str, float]:
        """The mean reward of each source, where there are several."""
        means = {}
        for name in self.weights if len(self.weights) > 1 else ():
            given = [reward for each in trajectories if (reward := each.rewards[name]) is not None]
            means[f"reward/{name}"] = float(np.mean(given)) if given else 0.0
        return means

    def state_dict(self) -> dict[str, Any]:
        return asdict(self.moments)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments = RunningMoments(**state)


def _completion(each: Trajectory) -> Any:
    """The response as reward functions get it: a text, or a list with one message if the prompt is a conversation."""
    return each.text if isinstance(each.prompt.text, str) else [{"role": "assistant", "content": each.text}]
