"""Critics: a linear layer on the policy's last hidden states, or a network of its own. Both are trained beside it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ptft_dist.errors import RecipeError
from ptft_dist.networks.frozen import FrozenSource
from ptft_dist.networks.load import build_network

VALUE_HEAD, CRITIC = "value_head", "critic"
"""Names of the modules in the trained network."""
_HEAD = "score"
"""The layer of decoders that reads the last hidden states. `classifier` reads something else: the pooled states of an
encoder, or those of one more layer."""


def add_value_head(model: Any, hidden_size: int) -> None:
    """Add a trained linear layer [hidden_size -> 1] to a network. Its weights are 0, so all values are 0 at first."""
    head = torch.nn.Linear(hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    setattr(model, VALUE_HEAD, head)


def add_critic(model: Any, source: FrozenSource) -> PreTrainedModel:
    """Add a trained critic of its own to a network: the network of `source` with its head, or with one of zeros.

    Raises:
        RecipeError: it cannot be loaded, or gives no value for a token.
    """
    config = source.config()
    config.num_labels = 1
    critic, fresh = build_network(source.section, config, 0, AutoModelForSequenceClassification, key=source.key)
    head = getattr(critic, _HEAD, None)
    if not isinstance(head, torch.nn.Linear) or any(not each.startswith(f"{_HEAD}.") for each in fresh):
        raise RecipeError(
            f"{source.key}: {source.path} cannot be a critic. Use a decoder, or a reward model that is one, with a "
            f"linear layer {_HEAD!r} on its last hidden states"
        )
    if fresh:
        for parameter in head.parameters():
            torch.nn.init.zeros_(parameter)
    setattr(model, CRITIC, critic.requires_grad_())
    return critic


def token_values(critic: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The value after each token: fp32 [B, T]."""
    head = getattr(critic, _HEAD)
    states = critic.base_model(**inputs, use_cache=False).last_hidden_state
    values: torch.Tensor = head(states.to(head.weight.dtype))
    return values.float().squeeze(-1)
