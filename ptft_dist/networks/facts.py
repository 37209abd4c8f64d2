"""Properties of a network that tasks, training loop and export need, read once before the network is wrapped.

Adapters, DDP, DeepSpeed and FSDP wrap a network in modules with other names and signatures, which hide its position
embeddings and the arguments of its forward. So no other module inspects a network.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class NetworkFacts:
    """Properties of one network."""

    model_type: str
    encoder_decoder: bool
    arguments: frozenset[str]
    """Names of the arguments of the network's `forward`."""
    position_padding_id: int | None
    """Positions start at this number + 1, as in RoBERTa; None: at 0."""
    max_positions: int | None
    """Maximum number of tokens in a row; None: no known limit, as with relative positions."""
    token_types: int
    """Number of token types, also called segments (BERT: 2); 0 or 1: the network ignores them."""
    layers: int
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    """Input embeddings and output projection are one parameter."""
    output_head: str | None
    """Name of the module that computes the logits, such as `lm_head`; None: there is none."""
    pad_token_id: int | None
    decoder_start_id: int | None
    """The start token of an encoder-decoder network's decoder."""
    eos_ids: tuple[int, ...]
    """Tokens that end generation, from the network's generation config."""
    router_loss_weight: float
    """Weight of the load balancing loss of a mixture of experts; 0: transformers computes none for this network."""
    experts: int
    """Number of experts per layer of a mixture of experts, without shared experts; else 0."""
    experts_per_token: int

    @property
    def position_offset(self) -> int:
        """The position id of a row's first token."""
        return 0 if self.position_padding_id is None else self.position_padding_id + 1

    @property
    def has_token_types(self) -> bool:
        return self.token_types > 1

    def takes(self, argument: str) -> bool:
        """Whether `forward` has this argument."""
        return argument in self.arguments


def read_facts(model: PreTrainedModel) -> NetworkFacts:
    """The properties of a network that is not wrapped yet."""
    config, text = model.config, model.config.get_text_config()
    table = _position_table(model)
    padding_id = None if table is None else table.padding_idx
    rows = getattr(text, "max_position_embeddings", None)
    max_positions = rows if isinstance(rows, int) and rows > 0 else None
    if table is not None and padding_id is not None:
        max_positions = table.weight.shape[0] - padding_id - 1
    embedding, head = input_embedding(model), model.get_output_embeddings()
    generation = getattr(model, "generation_config", None)  # None for networks that do not generate
    starts = (getattr(each, "decoder_start_token_id", None) for each in (config, generation))
    arguments = frozenset(inspect.signature(model.forward).parameters)
    experts = int(_first((model, text), "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"))
    has_router_loss = experts > 1 and "output_router_logits" in arguments
    return NetworkFacts(
        model_type=config.model_type,
        encoder_decoder=bool(config.is_encoder_decoder),
        arguments=arguments,
        position_padding_id=padding_id,
        max_positions=max_positions,
        token_types=getattr(config, "type_vocab_size", None) or 0,
        layers=getattr(text, "num_hidden_layers", 0),
        hidden_size=getattr(text, "hidden_size", 0),
        vocab_size=text.vocab_size,
        tied_embeddings=head is not None and getattr(embedding, "weight", None) is getattr(head, "weight", object()),
        output_head=next((name for name, module in model.named_modules() if head is not None and module is head), None),
        pad_token_id=text.pad_token_id,
        decoder_start_id=next((int(start) for start in starts if start is not None), None),
        eos_ids=_listed(getattr(generation, "eos_token_id", None)),
        router_loss_weight=_first((model, text), "router_aux_loss_coef", "aux_loss_coef") if has_router_loss else 0.0,
        experts=experts,
        experts_per_token=int(_first((model, text), "num_experts_per_tok")),
    )


def input_embedding(model: PreTrainedModel) -> torch.nn.Module | None:
    """The token embedding; None for networks without one, such as Canine, which hashes characters."""
    try:
        embedding: torch.nn.Module | None = model.get_input_embeddings()
    except NotImplementedError:
        return None
    return embedding


def _first(owners: Sequence[object], *names: str) -> float:
    """The first number under one of these names; 0 if there is none."""
    values = (getattr(owner, name, None) for owner in owners for name in names)
    return next((float(value) for value in values if isinstance(value, int | float)), 0.0)


def _position_table(model: PreTrainedModel) -> Any:
    """The learned position embeddings if they reserve an id for padding, else None."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and hasattr(module, "padding_idx"):
            return module if module.padding_idx is not None else None
    return None


def _listed(ids: int | list[int] | None) -> tuple[int, ...]:
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)


def labels_of(config: PretrainedConfig) -> list[str]:
    """The names of a network's labels, in the order of their ids."""
    names: Any = config.id2label or {}
    return [str(names[i]) for i in sorted(names)]
