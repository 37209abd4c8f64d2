"""Creates tasks from a recipe as a session does, for tests of a single task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ptft_dist.config.recipe import Recipe
from ptft_dist.networks.facts import NetworkFacts, read_facts
from ptft_dist.tasks.protocol import TaskSetup
from ptft_dist.tasks.registry import task_class

CPU = torch.device("cpu")


def plain_network(**changes: Any) -> NetworkFacts:
    """The NetworkFacts of a simple network with an attention mask; no network is built."""
    values: dict[str, Any] = {
        "model_type": "made-up",
        "encoder_decoder": False,
        "arguments": frozenset({"input_ids", "attention_mask"}),
        "position_padding_id": None,
        "max_positions": None,
        "token_types": 0,
        "layers": 2,
        "hidden_size": 8,
        "vocab_size": 100,
        "tied_embeddings": False,
        "output_head": None,
        "pad_token_id": 0,
        "decoder_start_id": 0,
        "eos_ids": (),
        "router_loss_weight": 0.0,
        "experts": 0,
        "experts_per_token": 0,
    }
    return NetworkFacts(**{**values, **changes})


def make_task(
    recipe: Recipe,
    tokenizer: Any,
    survey: Mapping[str, Any] | None = None,
    *,
    model: PreTrainedModel | None = None,
    device: torch.device = CPU,
    network: NetworkFacts | None = None,
    base: Path = Path(),
) -> Any:
    """The recipe's task for `model`, which is prepared for it; or for a network with the facts `network`."""
    facts = read_facts(model) if model is not None else network or plain_network()
    task = task_class(recipe.task)(TaskSetup.of(recipe, tokenizer, survey or {}, base), facts, device)
    if model is not None:
        task.prepare_network(model)
    return task


def for_model(task: Any, model: PreTrainedModel) -> Any:
    """The same task for this network, which is prepared for it."""
    again = type(task)(task.setup, read_facts(model), task.device)
    again.prepare_network(model)
    return again
