"""From scores to advantages: pure functions on the tokens of one response, or on all responses of a rollout.

All arrays are fp32 on the CPU. [R] has one number for each token of a response, the end of the text included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

KlEstimator = Literal["k1", "k2", "k3"]


def kl_per_token(logprobs: np.ndarray, reference: np.ndarray, estimator: KlEstimator) -> np.ndarray:
    """An estimate of KL(policy || reference) at each token, from the sampled tokens only: nats [R].

    With r = reference(token) / policy(token): k1 = -log r is unbiased; k2 = (log r)^2 / 2 has less variance and a small
    bias; k3 = (r - 1) - log r is unbiased and never negative (Schulman 2020, "Approximating KL divergence").

    Args:
        logprobs, reference: log-probabilities of the sampled tokens [R].
    """
    log_ratio = reference - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    return np.expm1(log_ratio) - log_ratio


def token_rewards(score: float, kl: np.ndarray, coefficient: float) -> np.ndarray:
    """The reward of each token: the KL penalty everywhere, and the score at the last token: [R].

    This is the reward of Ziegler et al. 2019, equation 2, given when the response ends. The last token is the EOS, or
    the last one that was sampled.
    """
    rewards = -coefficient * kl
    rewards[-1] += score
    return rewards


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """Generalized advantage estimation (Schulman et al. 2016, equations 11, 12 and 16) for one response: [R].

    The response is an episode, so the value after its last token is 0.

    Args:
        rewards: of each token [R].
        values: V(s_t), of the state in which token t was sampled [R].
        gamma: the discount.
        lam: 0 gives the one-step temporal difference, 1 the return minus the value.
    """
    advantages, next_value, next_advantage = np.zeros_like(values), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        advantages[t] = next_advantage = delta + gamma * lam * next_advantage
        next_value = values[t]
    return advantages


def whiten(parts: Sequence[np.ndarray], *, shift_mean: bool = True) -> list[np.ndarray]:
    """The arrays with variance 1 over all their numbers together, and with mean 0 unless `shift_mean` is false.

    The parts are the responses of a whole rollout on all ranks, so the result does not depend on how they are
    distributed. The variance is the unbiased one.
    """
    everything = np.concatenate(parts).astype(np.float64)
    mean, variance = everything.mean(), everything.var(ddof=1) if len(everything) > 1 else 0.0
    scale = 1 / np.sqrt(variance + 1e-8)
    kept = 0.0 if shift_mean else mean
    return [((part - mean) * scale + kept).astype(np.float32) for part in parts]


def importance_weights(logprobs: np.ndarray, sampled: np.ndarray, most: float) -> np.ndarray:
    """min(policy(token) / sampler(token), most) for responses that another program sampled: [R].

    The losses of policies are linear in advantages, so advantages times these weights are what the policy's own samples
    would teach (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"); the limit
    keeps their variance small (Ionides 2008).

    Args:
        logprobs, sampled: log-probabilities of the sampled tokens, of the policy and of the sampler [R].
    """
    return np.minimum(np.exp(logprobs - sampled), np.float32(most))


def group_advantages(
    scores: np.ndarray, group_size: int, baseline: Literal["group_mean", "leave_one_out"], *, scale: bool
) -> np.ndarray:
    """The advantage of each response over the others for the same prompt: [N].

    Args:
        scores: [N]; each run of `group_size` scores belongs to one prompt.
        baseline: `group_mean`: the mean of the group (GRPO, Shao et al. 2024, section 4.1.2). `leave_one_out`: the mean
            of the other responses, which is unbiased (RLOO, Kool et al. 2019; Ahmadian et al. 2024).
        scale: divide by the standard deviation of the group (unbiased), as GRPO does. Dr. GRPO does not, because it
            favours prompts that are nearly always or nearly never answered (Liu et al. 2025).
    """
    groups = scores.reshape(-1, group_size).astype(np.float64)
    if baseline == "leave_one_out":
        means = (groups.sum(1, keepdims=True) - groups) / (group_size - 1)
    else:
        means = groups.mean(1, keepdims=True)
    advantages = groups - means
    if scale:
        advantages /= groups.std(1, ddof=1, keepdims=True) + 1e-4
    return advantages.reshape(-1).astype(np.float32)


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 - Var(returns - values) / Var(returns): 1 for a perfect critic, 0 for one that predicts a constant."""
    variance = returns.var()
    return float(1 - (returns - values).var() / variance) if variance > 0 else 0.0


def adapted_kl_coefficient(coefficient: float, kl: float, target: float, samples: int, horizon: int) -> float:
    """The coefficient after a rollout whose mean KL per response was `kl` (Ziegler et al. 2019, section 2.2).

    The relative error is clipped to 20 %, and its effect is spread over `horizon` responses.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * samples / horizon)
