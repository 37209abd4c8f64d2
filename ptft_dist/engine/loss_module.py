"""The network inside the module that data parallelism wraps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel


class LossModule(torch.nn.Module):
    """Wraps the network in a module whose forward calls any function of it, so that data-parallel hooks run.

    Accelerate, DeepSpeed and transformers use other methods and attributes of a network too, such as tie_weights and
    get_input_embeddings. These are delegated to the network.
    """

    base_model_prefix = "base_model"  # Accelerate looks for the final norm among the children of this attribute

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.config = model.config  # DeepSpeed's "auto" bucket sizes read it
        self._no_split_modules = _wrapped_classes(model)  # FSDP's wrapping reads it
        self._tied_elsewhere = _tied_elsewhere(model)

    def forward(self, inputs: dict[str, torch.Tensor], call: Callable[..., Any]) -> Any:
        """Return call(network, inputs). A named tuple becomes a plain tuple."""
        out = call(self.model, inputs)
        return tuple(out) if isinstance(out, tuple) else out

    @property
    def base_model(self) -> torch.nn.Module:
        base: torch.nn.Module = self.model.base_model
        return base

    def tie_weights(self) -> None:
        self.model.tie_weights()

    def get_input_embeddings(self) -> torch.nn.Module | None:
        """None also if Accelerate, which shards embedding and head apart from the rest, would untie them from it."""
        return None if self._tied_elsewhere else self.model.get_input_embeddings()

    def get_output_embeddings(self) -> torch.nn.Module | None:
        head: torch.nn.Module | None = None if self._tied_elsewhere else self.model.get_output_embeddings()
        return head

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(self.model.is_gradient_checkpointing)


def _wrapped_classes(model: PreTrainedModel) -> list[str] | None:
    """The names of the classes whose modules FSDP wraps, without those that contain the token embeddings, such as
    BertEmbeddings: Accelerate wraps the embeddings itself, with the output head if both are tied."""
    names = getattr(model, "_no_split_modules", None)
    if names is None:
        return None
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # a network without token embeddings
        return list(names)
    around = {type(part).__name__ for part in model.modules() if any(inner is embedding for inner in part.modules())}
    return [name for name in names if name not in around]


def _tied_elsewhere(model: PreTrainedModel) -> bool:
    """Whether a parameter of the token embedding or the output head is also one of another module: in T5, encoder and
    decoder have the embedding too, and in BERT the head's bias has two owners."""
    try:
        ends = [part for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None]
    except NotImplementedError:  # a network without token embeddings
        return False
    own = {id(parameter) for part in ends for parameter in part.parameters()}
    inside = {id(part) for end in ends for part in end.modules()}
    others = [part for part in model.modules() if id(part) not in inside]
    return any(id(parameter) in own for part in others for parameter in part.parameters(recurse=False))
