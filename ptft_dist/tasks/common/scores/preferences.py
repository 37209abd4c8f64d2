"""Scores of the rewards of preference pairs."""

from __future__ import annotations

import numpy as np

BINS = 10
QUANTILES = (5, 50, 95)
NAMES = (
    "accuracy",
    "margin",
    "accuracy_longer",
    "accuracy_shorter",
    "ece",
    "brier",
    "chosen_mean",
    "chosen_std",
    "rejected_mean",
    "rejected_std",
    *(f"reward_p{q:02}" for q in QUANTILES),
)


def preference_scores(rewards: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """How well rewards order pairs, beside two rules that read only the lengths, and how they are distributed.

    accuracy: share of pairs whose chosen text has the higher reward; equal rewards are wrong.
    margin: mean of the reward of the chosen text minus that of the rejected one.
    accuracy_longer, accuracy_shorter: accuracy of always preferring the longer or the shorter text; equal lengths count
        one half.
    ece, brier: expected calibration error (Guo et al. 2017) and Brier score of sigmoid(chosen - rejected) as the
        probability that the chosen text is better.
    chosen_mean, chosen_std, rejected_mean, rejected_std, reward_p05, reward_p50, reward_p95: distribution; the
        quantiles are over all texts.

    Args:
        rewards: of the chosen and of the rejected texts [N, 2].
        lengths: in tokens [N, 2].
    """
    chosen, rejected = rewards.T
    probability = 1 / (1 + np.exp(-np.clip(chosen - rejected, -500, 500)))
    longer = np.sign(lengths[:, 0] - lengths[:, 1])
    return {
        "accuracy": float((chosen > rejected).mean()),
        "margin": float((chosen - rejected).mean()),
        "accuracy_longer": float((1 + longer).mean() / 2),
        "accuracy_shorter": float((1 - longer).mean() / 2),
        "ece": calibration_error(probability),
        "brier": float(((1 - probability) ** 2).mean()),
        "chosen_mean": float(chosen.mean()),
        "chosen_std": float(chosen.std()),
        "rejected_mean": float(rejected.mean()),
        "rejected_std": float(rejected.std()),
        **{f"reward_p{q:02}": float(np.percentile(rewards, q)) for q in QUANTILES},
    }


def calibration_error(probability: np.ndarray) -> float:
    """The expected calibration error: |accuracy - mean confidence|, averaged over pairs in bins of equal confidence.

    The confidence is the probability of the text that is predicted to be better, in [0.5, 1].

    Args:
        probability: that the chosen text is better [N].
    """
    confidence, correct = np.maximum(probability, 1 - probability), probability > 0.5
    bins = np.minimum((2 * (confidence - 0.5) * BINS).astype(int), BINS - 1)
    gaps = [abs(float(correct[bins == b].sum() - confidence[bins == b].sum())) for b in range(BINS)]
    return sum(gaps) / len(probability)
