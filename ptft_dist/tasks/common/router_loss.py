"""The load balancing loss of mixture-of-experts networks (Fedus et al. 2021, Switch Transformer, equation 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def router_loss(router_logits: Sequence[torch.Tensor], lengths: torch.Tensor, experts_per_token: int) -> torch.Tensor:
    """The load balancing loss of each row: fp32 [B]; it equals experts_per_token if all experts are used evenly.

    For one row it is E x (sum over experts e of f_e x P_e), where f_e is how often e is chosen per token, and P_e is
    the router's mean probability of e. Both are means over the row's tokens and the layers. transformers'
    `load_balancing_loss_func` averages over a whole micro-batch, so its value depends on the split into micro-batches.
    The mean over each row, as in DeepSeek-V3 (Liu et al. 2024, equations 17 to 20), does not.

    Args:
        router_logits: one [B x T, E] for each layer with experts, before the softmax, padding included. Without such
            layers it is empty, and the loss is 0.
        lengths: int64 [B]: tokens of each row; 0 or -100 for a dummy row, whose loss is 0.
        experts_per_token: number of experts chosen for each token (top-k).
    """
    if not router_logits:
        return torch.zeros(lengths.shape, device=lengths.device)
    batch = lengths.size(0)
    logits = torch.stack([layer.float().view(batch, -1, layer.size(-1)) for layer in router_logits])  # [L, B, T, E]
    tokens = torch.arange(logits.size(2), device=logits.device)[None, :] < lengths[:, None]
    weights = (tokens / lengths.clamp(min=1)[:, None]).to(logits.dtype) / logits.size(0)  # [B, T]
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(experts_per_token, -1).indices, 1.0)
    used = torch.einsum("lbte,bt->be", chosen, weights)
    likely = torch.einsum("lbte,bt->be", probabilities, weights)
    return logits.size(-1) * (used * likely).sum(-1)
