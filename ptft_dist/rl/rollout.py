"""One phase of reinforcement learning: from prompts to responses with scores, log-probabilities and values.

Every rank samples its share of the responses and runs its share of the other passes; what a rank has computed is then
gathered, so that all of them hold the whole rollout. Only numbers of sampled tokens are gathered, never logits.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ptft_dist.config.rollouts import SamplingSettings
from ptft_dist.errors import RecipeError
from ptft_dist.rl.advantages import importance_weights
from ptft_dist.rl.sampling import response_seed, sample, until_end


class Processes(Protocol):
    """The methods of the engine that a rollout needs. All ranks must call them together."""

    rank: int
    model: Any
    """The trained network, as transformers and peft know it."""
    accelerator: Any
    """Accelerate's, for libraries that want one."""

    def forward(self, call: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Any:
        """call(network, inputs) of the trained network."""

    def generating(self) -> AbstractContextManager[None]:
        """The weights are complete, so that ranks may call the network a different number of times."""

    def evaluating(self) -> AbstractContextManager[None]:
        """Evaluation mode without gradients."""

    def gather_objects(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank."""


Split = Callable[[np.ndarray], list[list[np.ndarray]]]
"""Lengths [N] -> micro-batches: for each rank the indices of its rows. Sorted by length, for little padding."""


@dataclass(frozen=True)
class Phase:
    """Where a rollout happens. number: from 0."""

    number: int
    processes: Processes
    split: Split
    """Micro-batches of forward passes."""
    split_sampling: Split
    """Micro-batches of sampling."""

    def micro_batches(self, lengths: np.ndarray, split: Split) -> Iterator[tuple[list[int], bool]]:
        """This rank's rows in each micro-batch, and whether they count. A rank without rows repeats row 0, because all
        ranks must run the same number of passes."""
        for parts in split(lengths):
            own = parts[self.processes.rank].tolist()
            yield own or [0], bool(own)

    def gathered(self, mine: Mapping[int, Any], count: int) -> list[Any]:
        """The results of all ranks by row number."""
        found = {i: value for part in self.processes.gather_objects(dict(mine)) for i, value in part.items()}
        return [found[i] for i in range(count)]


@dataclass(frozen=True)
class Prompt:
    """A prompt. row: its number in the store."""

    row: int
    ids: np.ndarray
    text: Any
    """A text, or a list of messages."""
    columns: Mapping[str, Any]
    """The other columns of its row."""
    tools: list[Any] | None = None
    """JSON schemas of the functions that a conversation may call."""


@dataclass
class Trajectory:
    """A response to a prompt, and what is known of its R tokens."""

    prompt: Prompt
    number: int
    """From 0 among the responses to the same row of the store."""
    response: np.ndarray
    """int64 [R], its EOS included."""
    ended: bool
    """Whether it has an EOS."""
    text: str = ""
    """Without special tokens."""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """Source -> reward."""
    score: float = 0.0
    """The reward of the whole response that is learned from."""
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    """fp32 [R] each: sampled, logprobs, reference, values, advantages, returns."""

    def __len__(self) -> int:
        return len(self.prompt.ids) + len(self.response)


@dataclass(frozen=True)
class Rollout:
    """The result of a phase, the same on every rank. metrics: averages over responses. samples: responses to show."""

    trajectories: list[Trajectory]
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


class Clock:
    """Seconds of the parts of a rollout."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, name: str) -> None:
        """Name the time since the last lap."""
        now = time.perf_counter()
        self.laps[name], self._since = round(now - self._since, 4), now


class Response(NamedTuple):
    """A sampled response."""

    ids: np.ndarray
    """int64 [R], its EOS included."""
    ended: bool
    """Whether it has an EOS."""
    logprobs: np.ndarray | None = None
    """fp32 [R], according to what sampled it, if that is not the trained network itself."""


Sampler = Callable[[Phase, Sequence[np.ndarray], Sequence[int]], list[Response]]
"""(phase, token ids of N prompts, N seeds) -> N responses, on every rank."""


@dataclass(frozen=True)
class NetworkSampler:
    """Samples with the trained network itself."""

    settings: SamplingSettings
    padded: Callable[[Sequence[np.ndarray]], dict[str, torch.Tensor]]
    """Pads prompts on the left: input_ids and attention_mask [B, P]."""
    pad_id: int
    eos_ids: Sequence[int]

    def __call__(self, phase: Phase, prompts: Sequence[np.ndarray], seeds: Sequence[int]) -> list[Response]:
        lengths = np.array([len(ids) for ids in prompts])
        mine: dict[int, Response] = {}
        with phase.processes.generating():
            for rows, count in phase.micro_batches(lengths, phase.split_sampling):

                def call(model: Any, inputs: dict[str, torch.Tensor], rows: list[int] = rows) -> torch.Tensor:
                    own = [seeds[i] for i in rows]
                    return sample(model, inputs, self.settings, own, pad_id=self.pad_id, eos_ids=self.eos_ids)

                ids = phase.processes.forward(call, self.padded([prompts[i] for i in rows])).cpu().numpy()
                if count:
                    mine |= {i: Response(*until_end(each, self.eos_ids)) for i, each in zip(rows, ids, strict=True)}
        return phase.gathered(mine, len(prompts))


def sample_responses(
    phase: Phase, prompts: Sequence[Prompt], group_size: int, seed: int, sampler: Sampler
) -> list[Trajectory]:
    """`group_size` responses to each prompt, in the order of the prompts.

    A prompt may occur twice, if an epoch ends within the rollout; its responses are numbered on, so that no two have
    the same seed. The log-probabilities of another sampler become the tokens' `sampled`.
    """
    drawn: Counter[int] = Counter()
    wanted = []
    for prompt in prompts:
        first = drawn[prompt.row]
        drawn[prompt.row] += group_size
        wanted += [(prompt, number) for number in range(first, first + group_size)]
    seeds = [response_seed(seed, phase.number, prompt.row, number) for prompt, number in wanted]
    trajectories = []
    for given, each in zip(wanted, sampler(phase, [prompt.ids for prompt, _ in wanted], seeds), strict=True):
        trajectories.append(Trajectory(*given, each.ids, each.ended))
        if each.logprobs is not None:
            trajectories[-1].tokens["sampled"] = each.logprobs
    return trajectories


def look_up(
    phase: Phase,
    trajectories: Sequence[Trajectory],
    forward: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    collate: Callable[[Sequence[Trajectory]], dict[str, torch.Tensor]],
) -> None:
    """Add numbers of each response token to the trajectories.

    Args:
        forward: inputs -> name -> [B, R], padded on the right.
        collate: the inputs of a micro-batch.
    """
    lengths = np.array([len(each) for each in trajectories])
    mine: dict[int, dict[str, np.ndarray]] = {}
    for rows, count in phase.micro_batches(lengths, phase.split):
        found = {name: x.float().cpu().numpy() for name, x in forward(collate([trajectories[i] for i in rows])).items()}
        for b, i in enumerate(rows if count else ()):
            mine[i] = {name: x[b, : len(trajectories[i].response)] for name, x in found.items()}
    for each, numbers in zip(trajectories, phase.gathered(mine, len(trajectories)), strict=True):
        each.tokens |= numbers


def weigh(trajectories: Sequence[Trajectory], most: float) -> dict[str, float]:
    """Multiply advantages by `importance_weights`, because another program sampled; metrics of the difference."""
    weights = [importance_weights(each.tokens["logprobs"], each.tokens["sampled"], most) for each in trajectories]
    for each, weight in zip(trajectories, weights, strict=True):
        each.tokens["advantages"] = each.tokens["advantages"] * weight
    gaps = np.concatenate([np.abs(each.tokens["logprobs"] - each.tokens["sampled"]) for each in trajectories])
    every = np.concatenate(weights)
    return {
        "sampler_gap": float(gaps.mean()),  # nats
        "sampler_weight": float(every.mean()),
        "sampler_weight_limited": float((every == np.float32(most)).mean()),
    }


def judge(
    phase: Phase,
    trajectories: Sequence[Trajectory],
    name: str,
    texts: Sequence[np.ndarray],
    forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    padded: Callable[[Sequence[np.ndarray]], dict[str, torch.Tensor]],
) -> None:
    """Add the rewards of a reward model.

    Args:
        texts: token ids of each prompt with its response, for the reward model.
        forward: inputs -> scores [B].
        padded: pads them on the right: input_ids and attention_mask [B, T].

    Raises:
        RecipeError: a reward is not a finite number.
    """
    lengths = np.array([len(ids) for ids in texts])
    mine: dict[int, float] = {}
    for rows, count in phase.micro_batches(lengths, phase.split):
        scores = forward(padded([texts[i] for i in rows])).tolist()
        if count:
            mine |= dict(zip(rows, scores, strict=True))
    for each, score in zip(trajectories, phase.gathered(mine, len(trajectories)), strict=True):
        if not math.isfinite(score):
            raise RecipeError(
                f"rewards: the reward model {name} gave the score {score} to the response {each.text!r}. Its numbers "
                "overflow in fp16: use train.precision bf16 or fp32; otherwise its weights are damaged"
            )
        each.rewards[name] = score
