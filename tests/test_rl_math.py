"""The mathematics of `rl`: against definitions as naive loops, numbers computed by hand, and exact expectations."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pytest
import torch

from ptft_dist.errors import DataError
from ptft_dist.rl.advantages import (
    adapted_kl_coefficient,
    explained_variance,
    gae,
    group_advantages,
    kl_per_token,
    token_rewards,
    whiten,
)
from ptft_dist.rl.losses import clipped_policy_loss, clipped_value_loss, kl_loss, token_logprobs
from ptft_dist.rl.rewards import RunningMoments, final_number, mixed, shaped

POLICY, REFERENCE = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.25, 0.25, 0.4, 0.1])
TRUE_KL = sum(p * math.log(p / q) for p, q in zip(POLICY, REFERENCE, strict=True))


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def some(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- KL ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_kl_estimators_are_unbiased(estimator: Literal["k1", "k3"]) -> None:
    """Their expectation over the policy, by enumeration of all tokens."""
    values = kl_per_token(np.log(POLICY), np.log(REFERENCE), estimator)
    assert (POLICY * values).sum() == pytest.approx(TRUE_KL, abs=1e-12)


def test_the_kl_estimators_by_hand() -> None:
    """The policy is twice, and half, as likely as the reference."""
    logprobs, reference = np.log([0.5, 0.25]), np.log([0.25, 0.5])
    two = math.log(2)
    assert kl_per_token(logprobs, reference, "k1") == pytest.approx([two, -two])
    assert kl_per_token(logprobs, reference, "k2") == pytest.approx([two**2 / 2, two**2 / 2])
    assert kl_per_token(logprobs, reference, "k3") == pytest.approx([0.5 - 1 + two, 2 - 1 - two])


def test_k2_is_nearly_unbiased_for_near_policies_and_k3_is_never_negative() -> None:
    near = POLICY * (1 + 0.02 * np.array([1, -1, 1, -1]))
    near /= near.sum()
    kl = sum(p * math.log(p / q) for p, q in zip(POLICY, near, strict=True))
    assert (POLICY * kl_per_token(np.log(POLICY), np.log(near), "k2")).sum() == pytest.approx(kl, rel=0.02)
    assert (kl_per_token(some(0, 1000).numpy(), some(1, 1000).numpy(), "k3") >= 0).all()


def test_k3_keeps_its_digits_where_the_policies_are_nearly_equal() -> None:
    """exp(x) - 1 - x loses half of them in fp32."""
    (k3,) = kl_per_token(floats(0), floats(1e-3), "k3")
    assert k3 == pytest.approx(1e-6 / 2 + 1e-9 / 6, rel=1e-3)


def test_token_rewards_by_hand() -> None:
    kl = floats(0.5, -1.0, 2.0)
    assert token_rewards(3.0, kl, 0.1).tolist() == pytest.approx([-0.05, 0.1, 2.8])
    assert kl.tolist() == [0.5, -1.0, 2.0]  # it is not changed
    assert token_rewards(-1.0, floats(0.0), 0.0).tolist() == [-1.0]  # a response of EOS alone


def test_the_adapted_coefficient_by_hand() -> None:
    """Ziegler et al. 2019, section 2.2: e = clip(KL / target - 1, -0.2, 0.2); with 64 samples and a horizon of 640
    their K is 0.1."""
    assert adapted_kl_coefficient(0.5, 6.6, 6.0, 64, 640) == pytest.approx(0.5 * 1.01)
    assert adapted_kl_coefficient(0.5, 5.7, 6.0, 64, 640) == pytest.approx(0.5 * 0.995)
    assert adapted_kl_coefficient(0.5, 60.0, 6.0, 64, 640) == pytest.approx(0.5 * 1.02)
    assert adapted_kl_coefficient(0.5, -1.0, 6.0, 64, 640) == pytest.approx(0.5 * 0.98)  # k1 may be negative
    assert adapted_kl_coefficient(0.5, 6.0, 6.0, 64, 640) == 0.5


# --- advantages -------------------------------------------------------------------------------------------------------


def naive_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016, equation 16: A_t = sum over l of (gamma lam)^l delta_{t+l}; V is 0 after the end."""
    count, advantages = len(rewards), []
    for t in range(count):
        total = 0.0
        for step in range(count - t):
            following = values[t + step + 1] if t + step + 1 < count else 0.0
            delta = rewards[t + step] + gamma * following - values[t + step]
            total += (gamma * lam) ** step * delta
        advantages.append(total)
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("count", [1, 2, 17])
def test_gae_is_its_definition(gamma: float, lam: float, count: int) -> None:
    rewards, values = some(count, count).numpy(), some(count + 1, count).numpy()
    expected = naive_gae(rewards.tolist(), values.tolist(), gamma, lam)
    assert gae(rewards, values, gamma, lam).tolist() == pytest.approx(expected, abs=1e-5)


def test_gae_by_hand() -> None:
    """delta = [1 + 0.5 x 2 - 1, 0 + 0.5 x 4 - 2, 3 - 4] = [1, 0, -1]; each advantage adds 0.25 of the next one."""
    advantages = gae(floats(1, 0, 3), floats(1, 2, 4), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [1 - 0.0625, -0.25, -1]
    assert advantages.dtype == np.float32


def test_lambda_0_is_the_temporal_difference_and_1_the_return_minus_the_value() -> None:
    rewards, values = floats(1, 2, 3), floats(0.5, -1, 4)
    assert gae(rewards, values, 1.0, 0.0).tolist() == [1 - 1 - 0.5, 2 + 4 + 1, 3 - 4]
    assert gae(rewards, values, 1.0, 1.0).tolist() == [6 - 0.5, 5 + 1, 3 - 4]
    assert gae(rewards, values, 0.5, 1.0).tolist() == [1 + 0.5 * 3.5 - 0.5, 3.5 + 1, 3 - 4]


def masked_whiten(values: list[list[float]], *, shift_mean: bool) -> list[list[float]]:
    """As TRL's `masked_whiten`, which uses Bessel's correction, on the tokens of all rows."""
    flat = [x for row in values for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / (len(flat) - 1)
    kept = 0.0 if shift_mean else mean
    return [[(x - mean) / math.sqrt(variance + 1e-8) + kept for x in row] for row in values]


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_against_a_loop(shift_mean: bool) -> None:
    rows = [(3 * some(count, count) + 2).tolist() for count in (5, 1, 8)]
    whitened = whiten([np.array(row, np.float32) for row in rows], shift_mean=shift_mean)
    for ours, expected in zip(whitened, masked_whiten(rows, shift_mean=shift_mean), strict=True):
        assert ours.tolist() == pytest.approx(expected, abs=1e-5)
        assert ours.dtype == np.float32


def test_whitening_does_not_depend_on_how_tokens_are_split() -> None:
    numbers = some(0, 30).numpy()
    parts = np.split(numbers, [1, 4, 20])
    assert np.concatenate(whiten(parts)).tobytes() == whiten([numbers])[0].tobytes()


def test_whitening_of_equal_numbers_gives_zeros() -> None:
    (whitened,) = whiten([floats(2.5, 2.5, 2.5)])
    assert whitened.tolist() == [0, 0, 0]
    assert whiten([floats(7)])[0].tolist() == [0]  # one token has no variance


@pytest.mark.parametrize("scale", [True, False])
def test_group_advantages_of_grpo_against_a_loop(scale: bool) -> None:
    """Shao et al. 2024, section 4.1.2, with TRL's epsilon."""
    scores, expected = some(0, 12).numpy(), []
    for i in range(12):
        group = scores[i // 4 * 4 : i // 4 * 4 + 4].astype(float)
        mean = sum(group) / 4
        deviation = math.sqrt(sum((x - mean) ** 2 for x in group) / 3)
        expected.append((scores[i] - mean) / (deviation + 1e-4 if scale else 1.0))
    assert group_advantages(scores, 4, "group_mean", scale=scale).tolist() == pytest.approx(expected, abs=1e-6)


def test_group_advantages_of_rloo_against_a_loop() -> None:
    scores, expected = some(0, 12).numpy(), []
    for i in range(12):
        others = [scores[j] for j in range(i // 3 * 3, i // 3 * 3 + 3) if j != i]
        expected.append(scores[i] - sum(others) / 2)
    assert group_advantages(scores, 3, "leave_one_out", scale=False).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7, -1 / 3])
def test_a_group_of_equal_scores_has_no_advantage(value: float) -> None:
    for size in range(2, 20):
        scores = np.full(size * 2, value, np.float32)
        assert not group_advantages(scores, size, "group_mean", scale=True).any()
        assert np.abs(group_advantages(scores, size, "leave_one_out", scale=False)).max() < 1e-15


def test_explained_variance() -> None:
    returns = floats(1, 2, 3, 6)
    assert explained_variance(returns, returns) == 1
    assert explained_variance(np.full(4, 7, np.float32), returns) == 0
    # Var(returns) = (4 + 1 + 0 + 9) / 4 = 3.5, Var(errors [1, 1, 1, -1]) = 0.75
    assert explained_variance(floats(0, 1, 2, 7), returns) == pytest.approx(1 - 0.75 / 3.5)
    assert explained_variance(floats(1, 2), floats(3, 3)) == 0  # nothing to explain


# --- losses -----------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


def test_the_clipped_policy_loss_against_a_loop() -> None:
    logprobs, old, advantages = some(0, 3, 5), some(0, 3, 5) + 0.3 * some(1, 3, 5), some(2, 3, 5)
    result = clipped_policy_loss(logprobs, old, advantages, MASK, 0.2, 0.28)
    kl = clipped = ratios = 0.0
    for b in range(3):
        for t in range(5):
            if not MASK[b, t]:
                assert result.losses[b, t] == 0
                continue
            ratio = math.exp(float(logprobs[b, t]) - float(old[b, t]))
            advantage = float(advantages[b, t])
            limited = min(max(ratio, 0.8), 1.28)
            assert float(result.losses[b, t]) == pytest.approx(-min(ratio * advantage, limited * advantage), abs=1e-5)
            kl += ratio - 1 - math.log(ratio)
            ratios += ratio
            clipped += (ratio > 1.28 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    assert clipped > 0
    totals = {name: float(total) for name, (total, _) in result.metrics.items()}
    assert totals == pytest.approx({"approx_kl": kl, "ratio": ratios, "clip_fraction": clipped}, abs=1e-5)
    assert {float(count) for _, count in result.metrics.values()} == {9.0}


def test_the_gradient_is_zero_where_the_ratio_is_clipped() -> None:
    """Ratios 1.5, 1.5, 0.5, 0.5, 1 with advantages of both signs: the 1st and the 4th may gain nothing more."""
    logprobs = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.0]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0]])
    clipped_policy_loss(logprobs, torch.zeros(1, 5), advantages, torch.ones(1, 5), 0.2, 0.2).losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([0, 1.5, -0.5, 0, -2.0])  # else -A x ratio


def test_a_higher_upper_limit_leaves_the_lower_one() -> None:
    ratios, advantages = torch.tensor([[1.25, 1.35, 0.75]]), torch.tensor([[1.0, 1.0, -1.0]])
    losses = clipped_policy_loss(ratios.log(), torch.zeros(1, 3), advantages, torch.ones(1, 3), 0.2, 0.3).losses
    assert losses[0].tolist() == pytest.approx([-1.25, -1.3, 0.8])


@pytest.mark.parametrize("clip", [0.2, None])
def test_the_clipped_value_loss_against_a_loop(clip: float | None) -> None:
    values, old, returns = some(0, 3, 5), some(1, 3, 5), some(2, 3, 5)
    losses, metrics = clipped_value_loss(values, old, returns, MASK, clip)
    moved = 0
    for b in range(3):
        for t in range(5):
            value, before, wanted = (float(x[b, t]) for x in (values, old, returns))
            near = value if clip is None else min(max(value, before - clip), before + clip)
            errors = ((value - wanted) ** 2, (near - wanted) ** 2)
            assert float(losses[b, t]) == pytest.approx(0.5 * max(errors) * float(MASK[b, t]), abs=1e-5)
            moved += bool(MASK[b, t]) and errors[1] > errors[0]
    if clip is None:
        assert metrics == {}
    else:
        assert moved > 0
        assert [float(x) for x in metrics["value_clip_fraction"]] == [moved, 9]


def test_the_gradient_is_zero_where_the_value_is_clipped() -> None:
    """The return is 2, the old values are 0. Values that moved towards it by 1, past it to its other side, away from
    it by 1, and by less than the clip. Only the first may gain nothing more; after 3.9 the clipped value, 0.2, has the
    smaller error."""
    values = torch.tensor([[1.0, 3.9, -1.0, 0.1]], requires_grad=True)
    returns = torch.tensor([[2.0, 2.0, 2.0, 2.0]])
    clipped_value_loss(values, torch.zeros(1, 4), returns, torch.ones(1, 4), 0.2)[0].sum().backward()
    assert values.grad is not None
    assert values.grad[0].tolist() == pytest.approx([0, 1.9, -3.0, -1.9])


@pytest.mark.parametrize("loss", ["policy", "value", "kl"])
def test_padding_contributes_nothing(loss: str) -> None:
    """To neither loss, metrics nor gradient, whatever numbers stand there."""

    def run(garbage: float) -> tuple[list[Any], list[Any], list[Any]]:
        pad = MASK == 0
        now, old, wanted = (some(seed, 3, 5).masked_fill(pad, garbage * (seed + 1)) for seed in range(3))
        now.requires_grad_()
        metrics: dict[str, Any] = {}
        if loss == "policy":
            losses, metrics = clipped_policy_loss(now, old, wanted, MASK, 0.2, 0.2)
        elif loss == "value":
            losses, metrics = clipped_value_loss(now, old, wanted, MASK, 0.2)
        else:
            losses = kl_loss(now, old, MASK)
        losses.sum().backward()
        assert now.grad is not None
        assert not now.grad[pad].any()
        return losses.tolist(), now.grad.tolist(), [[float(x) for x in pair] for pair in metrics.values()]

    assert run(0.0) == run(-37.0) == run(500.0)


def test_the_kl_loss_and_its_gradient() -> None:
    """The derivative of exp(q - p) - (q - p) - 1 by p is 1 - exp(q - p)."""
    policy, reference = some(0, 3, 5).double(), some(1, 3, 5).double()
    logprobs = policy.clone().requires_grad_()
    losses = kl_loss(logprobs, reference, MASK.double())
    losses.sum().backward()
    assert logprobs.grad is not None
    for b in range(3):
        for t in range(5):
            p, q, mask = float(policy[b, t]), float(reference[b, t]), float(MASK[b, t])
            assert losses[b, t].item() == pytest.approx(mask * (math.exp(q - p) - (q - p) - 1))
            assert float(logprobs.grad[b, t]) == pytest.approx(mask * (1 - math.exp(q - p)))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_token_logprobs_against_torch_distributions(temperature: float) -> None:
    logits = 3 * some(0, 2, 4, 11)
    tokens = torch.tensor([[0, 10, 5, 3], [7, 7, -100, -100]])
    logprobs, entropies = token_logprobs(logits, tokens, temperature)
    categorical = torch.distributions.Categorical(logits=logits / temperature)
    real = tokens >= 0
    assert torch.allclose(logprobs[real], categorical.log_prob(tokens.clamp(min=0))[real], atol=1e-6)
    assert torch.allclose(entropies, categorical.entropy(), atol=1e-6)
    assert logprobs.isfinite().all()


def test_token_logprobs_of_a_network_in_16_bits_are_fp32() -> None:
    logits = some(0, 1, 2, 7).bfloat16()
    logprobs, entropies = token_logprobs(logits, torch.tensor([[1, 2]]), 1.0)
    assert logprobs.dtype == entropies.dtype == torch.float32
    assert torch.allclose(logprobs[0, 0], logits[0, 0].float().log_softmax(-1)[1])


# --- scores -----------------------------------------------------------------------------------------------------------


def test_running_moments_are_those_of_all_scores_so_far() -> None:
    batches = [(5 * some(count, count) + 100).numpy() for count in (1, 7, 64)]
    moments = RunningMoments()
    for i, batch in enumerate(batches):
        moments.add(batch)
        everything = np.concatenate(batches[: i + 1]).astype(np.float64)
        assert moments.mean == pytest.approx(everything.mean())
        assert moments.count == len(everything)
        if i:
            assert moments.deviation == pytest.approx(everything.std(ddof=1))


def test_running_moments_survive_a_checkpoint_to_the_bit() -> None:
    first, second = some(0, 9).numpy(), some(1, 5).numpy()
    uninterrupted, before = RunningMoments(), RunningMoments()
    for moments in (uninterrupted, before):
        moments.add(first)
    restored = RunningMoments(**json.loads(json.dumps(asdict(before))))
    for moments in (uninterrupted, restored):
        moments.add(second)
    assert asdict(restored) == asdict(uninterrupted)


def test_running_moments_without_spread_do_not_divide_by_zero() -> None:
    moments = RunningMoments()
    assert moments.deviation == 1
    moments.add(floats(3, 3, 3))
    assert (moments.mean, moments.deviation) == (3, 1)


LENGTHS, ENDED = np.array([3, 10, 12]), np.array([True, False, True])


def test_scores_without_options_are_unchanged() -> None:
    assert shaped(floats(1, 2, 3), LENGTHS, ENDED).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"clip": 1.5}, [-1.5, 1, 1.5]),
        ({"missing_eos_penalty": 2.0}, [-4, -1, 7]),
        ({"length_target": 9, "length_penalty": 0.5}, [-4, 0.5, 5.5]),
        ({"clip": 1.5, "missing_eos_penalty": 2.0, "length_target": 9, "length_penalty": 0.5}, [-1.5, -1.5, 0]),
    ],
)
def test_each_option_of_the_scores_by_hand(options: dict[str, Any], expected: list[float]) -> None:
    """Penalties come after clipping, so that clipping does not remove them."""
    scores = shaped(floats(-4, 1, 7), LENGTHS, ENDED, **options)
    assert scores.tolist() == pytest.approx(expected)
    assert scores.dtype == np.float32


def test_normalized_scores_by_hand() -> None:
    """After [1, 3] and [5]: mean 3, deviation 2; each rollout is normalized with its own scores included."""
    moments = RunningMoments()
    first = shaped(floats(1, 3), LENGTHS[:2], ENDED[:2], moments=moments)
    assert first.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])
    assert shaped(floats(5), LENGTHS[:1], ENDED[:1], moments=moments).tolist() == pytest.approx([1.0])


def test_rewards_are_mixed_by_weight_without_those_that_are_none() -> None:
    rewards = {"a": [1.0, None, 3.0], "b": [10.0, 20.0, None]}
    assert mixed(rewards, {"a": 2.0, "b": -0.5}).tolist() == [2 - 5, -10, 6]


def test_a_response_without_any_reward_is_an_error() -> None:
    with pytest.raises(DataError, match=r"none of a, b gave a reward"):
        mixed({"a": [1.0, None], "b": [None, None]}, {"a": 1.0, "b": 1.0})


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("She sells 9 x 2 = 18 of them.", "Janet sells 16 - 3 - 4 = 9.\n#### 18", 1),
        ("The answer is 1,234.", "#### 1,234", 1),
        ("#### 1,234", "1234", 1),
        ("That makes $12", "#### 12", 1),
        ("That makes -$12", "#### -12", 1),
        ("That makes -$12", "#### 12", 0),
        ("It is -7 degrees", "-7", 1),
        ("It is 7 degrees", "-7", 0),
        ("from 5-10", "10", 1),
        ("(3)-4", "4", 1),
        ("3.50", "3.5", 1),
        (".5", "0.5", 1),
        ("It costs 2.", "2", 1),
        ("**72** clips", "72", 1),
        ("no number", "3", 0),
        ("no number", "none either", 0),
        ("", "3", 0),
        ("18 or 19", "18", 0),
        ("18", 18, 1),
        ("18", 18.0, 1),
    ],
)
def test_the_final_number(completion: str, answer: Any, right: int) -> None:
    assert final_number([completion], [answer], other=[None]) == [right]
    assert final_number([[{"role": "assistant", "content": completion}]], [answer]) == [right]
