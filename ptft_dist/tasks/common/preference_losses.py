"""Losses that learn from preferences without a reward model: pure functions of log-probabilities of answers.

Notation: log pi(y|x) is the log-probability of an answer, summed over its tokens; a log-ratio is log pi(y|x) minus the
same of the reference. All functions return one value per row, fp32 [B]. They equal those of TRL's trainers.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def sigmoid_loss(logits: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """DPO (Rafailov et al. 2023, equation 7), and cDPO with label smoothing (Mitchell 2023).

    Args:
        logits: beta x (log-ratio of the chosen - log-ratio of the rejected answer) [B].
        label_smoothing: the probability that a pair is in the wrong order.
    """
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def robust_loss(logits: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Robust DPO (Chowdhury et al. 2024): an unbiased estimate of DPO's loss on pairs in the right order.

    Args:
        logits: see `sigmoid_loss`.
        label_smoothing: the probability that a pair is in the wrong order, below 1/2.
    """
    right, wrong = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)


def hinge_loss(logits: torch.Tensor) -> torch.Tensor:
    """The hinge loss of SLiC (Zhao et al. 2023) on DPO's logits, see `sigmoid_loss`."""
    return F.relu(1 - logits)


def ipo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """IPO (Azar et al. 2024, equation 17), where beta is the paper's tau.

    Args:
        chosen, rejected: log-ratios divided by the number of tokens [B], as TRL does after asking the authors.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo_loss(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float, label_smoothing: float = 0.0
) -> torch.Tensor:
    """SimPO (Meng et al. 2024, equation 6), without a reference.

    Args:
        chosen, rejected: log-probabilities divided by the number of tokens [B].
        gamma: the target margin of the rewards, which are beta x log-probability.
    """
    return sigmoid_loss(beta * (chosen - rejected) - gamma, label_smoothing)


def log_odds_ratio(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """The log of the ratio of the odds p / (1 - p) of two answers (ORPO, Hong et al. 2024, equation 7).

    Args:
        chosen, rejected: log-probabilities divided by the number of tokens [B], below 0.
    """
    return (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))


def odds_ratio_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """ORPO's L_OR (Hong et al. 2024, equation 7). ORPO adds beta times its mean to the mean negative log-likelihood
    (equation 6), without a reference. chosen, rejected: see `log_odds_ratio`."""
    return -F.logsigmoid(log_odds_ratio(chosen, rejected))


def kto_loss(ratios: torch.Tensor, desirable: torch.Tensor, baseline: torch.Tensor, beta: float) -> torch.Tensor:
    """KTO (Ethayarajh et al. 2024, equation 7), before the weights: 1 - sigmoid(beta (ratio - z)) if desirable, else
    1 - sigmoid(beta (z - ratio)).

    Args:
        ratios: log-ratios [B].
        desirable: bool [B].
        baseline: z, an estimate of the KL divergence from the reference: a scalar >= 0, without a gradient.
    """
    distance = beta * (ratios - baseline)
    return torch.sigmoid(torch.where(desirable, -distance, distance))


def apo_zero_unpaired_loss(ratios: torch.Tensor, desirable: torch.Tensor, beta: float) -> torch.Tensor:
    """APO-zero on unpaired answers (D'Oosterlinck et al. 2024, equation 7): `kto_loss` with z = 0."""
    return kto_loss(ratios, desirable, ratios.new_zeros(()), beta)


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0 (Maechler 2012): by expm1 near 0, by log1p otherwise."""
    near = x > -math.log(2)
    # Each branch gets harmless values where the other one is taken, because both have gradients.
    by_expm1 = torch.log(-torch.expm1(x.where(near, -1.0)))
    by_log1p = torch.log1p(-torch.exp(x.where(~near, -1.0)))
    return torch.where(near, by_expm1, by_log1p)
