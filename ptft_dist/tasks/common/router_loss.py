"""The load balancing loss of mixture-of-experts networks (Fedus et al. 2021, Switch Transformer, equation 4)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def router_loss(router_logits: Sequence[torch.Tensor], lengths: torch.Tensor, experts_per_token: int) -> torch.Tensor:
    """The load balancing loss of each row: fp32 [B], 1 x experts_per_token where all experts are used evenly.

    For a row, it is E x sum over experts e of f_e x P_e: f_e is the number of times that e is chosen, per token; P_e
    is the mean probability that the router gives it. Both are means over the row's tokens and over layers, as in
    transformers' `load_balancing_loss_func`. That function takes them over a whole micro-batch, so its value depends
    on which rows share one. Taken row by row (as the sequence-wise loss of DeepSeek-V3), it does not.

    Args:
        router_logits: of each layer, [B x T, E] (padding included).
        lengths: int64 [B]: tokens of each row; -100 or 0 for a row that counts nothing.
        experts_per_token: experts that are chosen for each token (top-k).
    """
    batch = lengths.size(0)
    logits = torch.stack([layer.float().view(batch, -1, layer.size(-1)) for layer in router_logits])  # [L, B, T, E]
    tokens = torch.arange(logits.size(2), device=logits.device)[None, :] < lengths[:, None]
    weights = (tokens / lengths.clamp(min=1)[:, None]).to(logits.dtype) / logits.size(0)  # [B, T]
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(-1, probabilities.topk(experts_per_token, -1).indices, 1.0)
    used = torch.einsum("lbte,bt->be", chosen, weights)
    likely = torch.einsum("lbte,bt->be", probabilities, weights)
    return logits.size(-1) * (used * likely).sum(-1)
