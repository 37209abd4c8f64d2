"""The losses of one micro-batch, summed over the tokens of responses, and what is shown about them.

All tensors are fp32 [B, R], one number for each response token; `mask` is 1 at tokens and 0 at padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

Totals = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name -> (total, count), for averages over micro-batches and ranks."""


class PolicyLoss(NamedTuple):
    """The clipped loss of each token, and diagnostics."""

    losses: torch.Tensor
    metrics: Totals


def clipped_policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """The clipped surrogate objective with its sign changed (Schulman et al. 2017, equation 7): losses [B, R].

    Args:
        logprobs, old_logprobs: log-probabilities of the response tokens, now and when they were sampled.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. They are equal in PPO; DAPO's
            "clip-higher" has a larger upper limit (Yu et al. 2025).
    """
    log_ratio = (logprobs - old_logprobs) * mask
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    count = mask.sum()
    with torch.no_grad():
        metrics = {
            "approx_kl": (((ratio - 1) - log_ratio).mul(mask).sum(), count),  # k3, of the old policy and the new one
            "clip_fraction": ((clipped > unclipped).float().mul(mask).sum(), count),
            "ratio": (ratio.mul(mask).sum(), count),
        }
    return PolicyLoss(torch.maximum(unclipped, clipped) * mask, metrics)


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor, clip: float | None
) -> tuple[torch.Tensor, Totals]:
    """Half the squared error of the values, where a value may not gain from moving by more than `clip`: losses [B, R].

    Schulman et al. 2017 do not clip it; their code does, and so do Ziegler et al. 2019 (Huang et al. 2022, detail 9).
    """
    squared = (values - returns) ** 2
    count = mask.sum()
    if clip is None:
        return 0.5 * squared * mask, {}
    near = old_values + (values - old_values).clamp(-clip, clip)
    squared_near = (near - returns) ** 2
    clipped = (squared_near > squared).float().mul(mask).sum().detach()
    return 0.5 * torch.maximum(squared, squared_near) * mask, {"value_clip_fraction": (clipped, count)}


def kl_loss(logprobs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The estimate k3 of KL(policy || reference) at each token, with a gradient: nats [B, R].

    GRPO adds it to the loss instead of the reward (Shao et al. 2024, equation 4).
    """
    log_ratio = (reference - logprobs) * mask
    return (log_ratio.exp() - 1 - log_ratio) * mask


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `tokens` at the sampling temperature, and the entropies: fp32 [B, R] each, in nats.

    Args:
        logits: [B, R, V], of the positions before the tokens.
        tokens: int64 [B, R]; negative ids (padding) give an arbitrary finite number.
    """
    log_softmax = torch.log_softmax(logits.float() / temperature, -1)
    chosen = log_softmax.gather(-1, tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen, -(log_softmax.exp() * log_softmax).sum(-1)


def detached(**values: tuple[Any, Any]) -> Totals:
    """The totals without their graphs."""
    return {name: (total.detach(), count) for name, (total, count) in values.items()}
