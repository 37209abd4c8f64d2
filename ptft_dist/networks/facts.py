"""What is known about a network, read once from the bare network before anything wraps it.

Adapters, DDP, DeepSpeed and FSDP wrap a network in modules with other names and signatures. Whoever looks at the
wrapped module finds no position embeddings and no `attention_mask` argument. So tasks are given these facts instead.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class NetworkFacts:
    """Facts about a network that tasks, the loop and exports rely on."""

    model_type: str
    encoder_decoder: bool
    arguments: frozenset[str]
    """Names of the arguments of the network's `forward`."""
    position_padding_id: int | None
    """RoBERTa and its kin count positions from here + 1 on; None: positions begin at 0."""
    max_positions: int | None
    """Rows with more tokens than this have no positions; None: no limit is known."""
    token_types: int
    """Kinds of segments that the network tells apart (BERT: 2); 0 or 1: none."""
    layers: int
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    """Input embedding and output projection are one parameter."""
    output_head: str | None
    """The name of the module that projects onto the vocabulary, such as `lm_head`."""
    pad_token_id: int | None
    decoder_start_id: int | None
    """The token with which a decoder begins, if the network has an encoder and a decoder."""
    eos_ids: tuple[int, ...]
    """Tokens at which the network's generation config stops."""
    router_loss_weight: float
    """The weight of a mixture-of-experts network's load balancing loss; 0 for all other networks."""
    experts: int
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
    """The facts of a network that is not wrapped."""
    config, text = model.config, model.config.get_text_config()
    table = _position_table(model)
    padding_id = None if table is None else table.padding_idx
    rows = getattr(text, "max_position_embeddings", None)
    max_positions = rows if isinstance(rows, int) and rows > 0 else None
    if table is not None and padding_id is not None:
        max_positions = table.num_embeddings - padding_id - 1
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    generation = getattr(model, "generation_config", None)  # networks that do not generate have none
    starts = (getattr(each, "decoder_start_token_id", None) for each in (config, generation))
    router = float(getattr(text, "router_aux_loss_coef", None) or 0.0)
    experts = next((n for key in _EXPERTS if isinstance(n := getattr(text, key, None), int)), 0)
    return NetworkFacts(
        model_type=config.model_type,
        encoder_decoder=bool(config.is_encoder_decoder),
        arguments=frozenset(inspect.signature(model.forward).parameters),
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
        router_loss_weight=router if experts > 1 else 0.0,
        experts=experts,
        experts_per_token=int(getattr(text, "num_experts_per_tok", None) or 0),
    )


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def _position_table(model: PreTrainedModel) -> torch.nn.Embedding | None:
    """The learned position embeddings, if there are any and some id is left out for padding."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            return module if module.padding_idx is not None else None
    return None


def _listed(ids: int | list[int] | None) -> tuple[int, ...]:
    return () if ids is None else tuple(ids) if isinstance(ids, list) else (ids,)
