"""Advantages, losses and gradients of GRPO and RLOO against TRL's trainers on the same responses.

TRL's own methods compute the advantages, log-probabilities and losses. Only generation and rewards are replaced, and
the trainers are made without `__init__`, which needs a data set and a tokenizer.
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rl_support import EOS, PAD, batch_of, llama, look, some_trajectories, task_for

from ptft_dist.engine import reset_accelerate
from ptft_dist.rl.rollout import Trajectory

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
MAX_NEW_TOKENS, GROUP = 8, 3


@pytest.fixture(autouse=True)
def _no_accelerate() -> Iterator[None]:
    yield
    reset_accelerate()


def trl_trainer(kind: str, model: Any, reference: Any, trajectories: Sequence[Trajectory], **changes: Any) -> Any:
    """A TRL trainer of one process, which gets these responses and scores."""
    import trl
    from trl.trainer.utils import add_fused_lm_head

    trainer: Any = object.__new__(getattr(trl, kind))
    temperature = changes.pop("temperature", 1.0)
    networks = [copy.deepcopy(each) for each in (model, reference)]
    for each in networks:
        add_fused_lm_head(each, temperature=temperature, outputs=("log_probs", "entropy"))
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        autocast=contextlib.nullcontext,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,  # noqa: ARG005
        unwrap_model=lambda x: x,
        sync_gradients=True,
        is_main_process=True,
    )
    args = SimpleNamespace(
        per_device_train_batch_size=100,
        gradient_accumulation_steps=3,  # no multiple of num_iterations: TRL keeps the rollout's log-probabilities
        steps_per_generation=1,
        gradient_checkpointing_kwargs=None,
        use_bias_correction_kl=False,
        delta=None,
        cast_lm_head_to_fp32=False,
    )
    values = {
        "model": networks[0].train(),
        "ref_model": networks[1].eval(),
        "accelerator": accelerator,
        "args": args,
        "_tokenizer": SimpleNamespace(pad_token_id=PAD),
        "eos_token_ids": [EOS],
        "pad_to_multiple_of": None,
        "mask_truncated_completions": False,
        "temperature": temperature,
        "num_generations": GROUP,
        "num_iterations": 2,
        "reward_weights": torch.ones(1),
        "reward_func_names": ["score"],
        "multi_objective_aggregation": "sum_then_normalize",
        "reward_clip_range": None,
        "normalize_advantages": False,
        "scale_rewards": "group",
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "aux_loss_enabled": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_NEW_TOKENS,
        "tools": None,
        "environments": None,
        "environment_factories": None,
        "_is_vlm": False,
        "log_multimodal": False,
        "_metrics": {"train": defaultdict(list)},
        "_logs": defaultdict(list) | {"rewards": defaultdict(list), "extra": defaultdict(list)},
        "_pending_extra_logs": {},
        "_pending_metrics": {},
    }
    vars(trainer).update(values | changes)
    prompts, responses = [t.prompt.ids.tolist() for t in trajectories], [t.response.tolist() for t in trajectories]
    trainer._generate = (
        (lambda _prompts: (prompts, responses, responses))
        if kind == "RLOOTrainer"
        else lambda _prompts: (prompts, responses, None, responses, None, {}, None, None)
    )
    trainer._calculate_rewards = lambda *_args: torch.tensor([[t.score] for t in trajectories])
    return trainer


def trl_rollout(trainer: Any, trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """TRL's advantages and log-probabilities: [B] and [B, R]."""
    rollout: dict[str, Any] = trainer._generate_and_score_completions([{"prompt": "a prompt"}] * len(trajectories))
    return rollout


def moved(model: Any, seed: int = 5) -> Any:
    """The same network after an update, so that ratios are not 1."""
    other, chance = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=chance)
    return other


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rolled_out(task: Any, model: Any, reference: Any, kl: float) -> list[Trajectory]:
    trajectories = some_trajectories()
    look(task, task.look_at_policy, model, trajectories)
    if kl:
        look(task, task.look_at_reference, reference, trajectories)
    task.advantages(trajectories)
    return trajectories


def test_the_trajectories_are_a_fair_test() -> None:
    """Groups differ in their prompt's and responses' lengths, and in whether responses end."""
    trajectories = some_trajectories()
    assert len({len(t.prompt.ids) for t in trajectories}) > 1
    assert len({len(t.response) for t in trajectories}) > 3
    assert {t.ended for t in trajectories} == {True, False}
    assert max(len(t.response) for t in trajectories) <= MAX_NEW_TOKENS


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    ("normalization", "kl", "clip_high", "scale"),
    [
        ("grpo", 0.0, None, True),
        ("grpo", 0.3, 0.28, True),
        ("dr_grpo", 0.0, None, False),
        ("dr_grpo", 0.3, 0.28, False),
        ("dapo", 0.0, 0.28, True),
        ("dapo", 0.3, None, True),
    ],
)
def test_grpo_is_trls(normalization: str, kl: float, clip_high: float | None, scale: bool, temperature: float) -> None:
    """Advantages, log-probabilities of both networks, loss, gradient, KL and entropy; after an update."""
    model = llama(0)
    reference = moved(model, 6)
    settings = {
        "normalization": normalization,
        "kl": kl,
        "clip_high": clip_high,
        "scale_rewards": scale,
        "clip": 0.15,
        "sampling": {"max_new_tokens": MAX_NEW_TOKENS, "temperature": temperature},
    }
    task = task_for(model, "grpo", settings)
    trajectories = rolled_out(task, model, reference, kl)

    trainer = trl_trainer(
        "GRPOTrainer",
        model,
        reference,
        trajectories,
        loss_type=normalization,
        beta=kl,
        epsilon_low=0.15,
        epsilon_high=clip_high or 0.15,
        scale_rewards="group" if scale else "none",
        temperature=temperature,
    )
    rollout = trl_rollout(trainer, trajectories)
    for b, each in enumerate(trajectories):
        length = len(each.response)
        assert np.allclose(each.tokens["advantages"], float(rollout["advantages"][b]), **TOLERANCE)
        assert np.allclose(each.tokens["logprobs"], rollout["old_per_token_logps"][b, :length], **TOLERANCE)
        if kl:
            assert np.allclose(each.tokens["reference"], rollout["ref_per_token_logps"][b, :length], **TOLERANCE)

    later = moved(model)
    trainer.model.load_state_dict(later.state_dict())
    expected = trainer._compute_loss(trainer.model, rollout)
    expected.backward()
    batch = batch_of(task, trajectories)
    found = task.loss(later, batch.inputs)
    loss = found.loss_sum / batch.count
    loss.backward()
    assert torch.allclose(loss, expected, **TOLERANCE)
    ours, theirs = gradients(later), gradients(trainer.model)
    assert set(ours) == set(theirs)
    assert all(torch.allclose(ours[name], theirs[name], **TOLERANCE) for name in ours)
    assert max(float(x.abs().max()) for x in ours.values()) > 1e-2

    metrics = {name: float(total / count) for name, (total, count) in found.metrics.items()}
    shown = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert metrics["entropy"] == pytest.approx(shown["entropy"], abs=1e-5)
    assert metrics["clip_fraction"] == pytest.approx(shown["clip_ratio/region_mean"], abs=1e-5)
    assert metrics["clip_fraction"] > 0


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_rloo_is_trls_on_the_first_pass(kl: float, whiten: bool) -> None:
    """Advantages with the KL in the score, and the gradient.

    TRL clips the ratio of the whole response, and divides by responses. Here ratios are clipped by token, and divided
    by tokens, as in PPO. So the gradients have the same direction on the first pass only.
    """
    model = llama(0)
    reference = moved(model, 6)
    task = task_for(model, "rloo", {"kl": kl, "whiten_advantages": whiten, "kl_estimator": "k1"})
    trajectories = rolled_out(task, model, reference, kl)
    trainer = trl_trainer("RLOOTrainer", model, reference, trajectories, beta=kl, epsilon_low=0.2, epsilon_high=0.2)
    rollout = trl_rollout(trainer, trajectories)
    if not whiten:  # TRL whitens over responses, here over tokens
        for b, each in enumerate(trajectories):
            assert np.allclose(each.tokens["advantages"], float(rollout["advantages"][b]), **TOLERANCE)
        trainer._compute_loss(trainer.model, rollout).backward()
        batch = batch_of(task, trajectories)
        assert batch.count == sum(len(each.response) for each in trajectories)
        (task.loss(model, batch.inputs).loss_sum / len(trajectories)).backward()
        ours, theirs = gradients(model), gradients(trainer.model)
        assert set(ours) == set(theirs)
        assert all(torch.allclose(ours[name], theirs[name], **TOLERANCE) for name in ours)
        assert max(float(x.abs().max()) for x in ours.values()) > 1e-2
    else:
        tokens = [float(rollout["advantages"][b]) for b, each in enumerate(trajectories) for _ in each.response]
        expected = (np.array(tokens) - np.mean(tokens)) / np.std(tokens, ddof=1)
        assert np.allclose(np.concatenate([each.tokens["advantages"] for each in trajectories]), expected, **TOLERANCE)


@pytest.mark.parametrize("scores", [[0.3] * 6, [0.1, 0.1, 0.1, 1.0, 2.0, 3.0]])
def test_groups_without_spread(scores: list[float]) -> None:
    """As TRL's `frac_reward_zero_std`; such groups have no gradient."""
    model = llama(0)
    task, trajectories = task_for(model, "grpo"), some_trajectories()
    for each, score in zip(trajectories, scores, strict=True):
        each.score = score
    metrics = task.advantages(trajectories)
    changes = {"beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2, "loss_type": "dapo"}
    trainer = trl_trainer("GRPOTrainer", model, model, trajectories, **changes)
    trl_rollout(trainer, trajectories)
    assert metrics["groups_without_spread"] == trainer._metrics["train"]["frac_reward_zero_std"][0]
    assert not np.concatenate([each.tokens["advantages"] for each in trajectories[:3]]).any()


def test_equal_scores_have_no_spread_in_a_group_of_any_size() -> None:
    """numpy's fp32 standard deviation of 7 x 0.1 is 7e-9."""
    for size in range(2, 20):
        task = task_for(llama(0), "grpo", {"group_size": size})
        trajectories = some_trajectories(2 * size)
        assert task.spread(trajectories, np.full(2 * size, 0.1, np.float32), "group_mean", scale=True) == {
            "groups_without_spread": 1.0
        }


@pytest.mark.parametrize("normalization", ["grpo", "dr_grpo", "dapo"])
def test_the_loss_does_not_depend_on_micro_batches(normalization: str) -> None:
    """Sums of losses and counts over parts are those of the whole, whatever the padding."""
    model = llama(0)
    task = task_for(model, "grpo", {"normalization": normalization})
    trajectories = rolled_out(task, model, model, 0.0)

    def total(parts: list[list[Trajectory]]) -> tuple[float, float]:
        batches = [batch_of(task, part) for part in parts]
        return (
            sum(float(task.loss(model, batch.inputs).loss_sum.detach()) for batch in batches),
            sum(batch.count for batch in batches),
        )

    whole = total([trajectories])
    assert total([[each] for each in trajectories]) == pytest.approx(whole, abs=1e-5)
    assert total([trajectories[:2], trajectories[2:]]) == pytest.approx(whole, abs=1e-5)
