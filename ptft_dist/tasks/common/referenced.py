"""The base class of tasks that compare the log-probabilities of answers with those of a reference network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ptft_dist.config.recipe import ModelSection
from ptft_dist.config.token_ids import id_count
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt.switching import adapters_off, check_base_stays, check_no_dropout, check_start_is_base
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.networks.frozen import FrozenSource
from ptft_dist.tasks.common.causal import NextTokenTask
from ptft_dist.tasks.common.dropout import turn_off_dropout
from ptft_dist.tasks.common.generation import end_ids, end_texts_with
from ptft_dist.tasks.common.padding import padded_width
from ptft_dist.tasks.common.reference_settings import ReferenceSettings
from ptft_dist.tasks.protocol import IGNORE, FrozenRole, StartColumn, TaskSetup

REFERENCE = "reference"
"""The role of the frozen network; the column of cached log-probabilities, and the batch input [B, K] with them."""

Inputs = dict[str, torch.Tensor]


class ReferencedTask(NextTokenTask):
    """The reference is the network that training starts from. Its log-probabilities come from one of three places:

    - with an adapter, from the same network with the adapter off, in the same forward pass of the engine;
    - `reference: cached`: from a column of the store, which is computed once before training, see `start_column`;
    - `reference: network`: from a second, frozen network.

    Dropout is off, as in TRL, so that policy and reference are equal at the start.
    """

    adds_router_loss = False
    settings: ReferenceSettings

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.reference: Any = None

    @classmethod
    def fit_config(cls, setup: TaskSetup, config: PretrainedConfig) -> None:  # noqa: ARG003
        """Raises RecipeError if the tokenizer has no EOS, with which answers end."""
        if setup.tokenizer.eos_token_id is None:
            raise RecipeError(
                "tokenizer: it has no EOS token, so the end of an answer cannot be learned. Name one as eos_token in "
                "its tokenizer_config.json"
            )

    @classmethod
    def frozen_roles(cls, setup: TaskSetup, section: ModelSection) -> dict[str, FrozenRole]:
        key, settings = f"{setup.name}.reference", setup.settings
        check_no_dropout(section.adapt, setup.name)
        if not settings.has_reference:
            return {}
        if section.adapt.adds_adapter:
            if settings.reference is not None:
                raise RecipeError(
                    f"{key}: has no effect here: with model.adapt, the adapter is switched off. Remove it"
                )
            check_start_is_base(section.adapt, f"task {setup.name}", "")
            check_base_stays(section.adapt, f"task {setup.name}", "")
            return {}
        if settings.reference != "network":
            return {}
        if section.path is None:
            raise RecipeError(f"{key}: network needs model.path, and the recipe has model.config. Use cached")
        return {REFERENCE: FrozenRole("model.path", section.path, section.revision, AutoModelForCausalLM)}

    @classmethod
    def start_column(cls, setup: TaskSetup, section: ModelSection) -> StartColumn | None:
        settings = setup.settings
        if not settings.has_reference or settings.reference == "network" or section.adapt.adds_adapter:
            return None
        return StartColumn(REFERENCE, cls.reference_width(settings))

    @classmethod
    def reference_width(cls, settings: Any) -> int:
        """The number of log-probabilities of the reference for each row."""
        raise NotImplementedError

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        return totals

    def prepare_network(self, model: PreTrainedModel) -> None:
        super().prepare_network(model)
        end_texts_with(model, end_ids(self.setup, self.network))
        turn_off_dropout(model)

    def extend_network(self, model: Any, section: ModelSection) -> None:
        super().extend_network(model, section)
        turn_off_dropout(model)  # also that of an adapter which is trained on

    def prepare_frozen(self, role: str, model: PreTrainedModel, source: FrozenSource) -> None:  # noqa: ARG002
        if model.config.get_text_config().vocab_size < id_count(self.tokenizer):
            raise RecipeError(
                f"{self.setup.name}.reference: the network of {source.path} has no embeddings for the tokens that were "
                "added to its tokenizer. Use cached"
            )
        self.prepare_network(model)

    def adopt(self, role: str, network: Any, facts: NetworkFacts) -> None:  # noqa: ARG002
        self.reference = network

    def padded_answers(self, texts: Sequence[tuple[np.ndarray, int]]) -> Inputs:
        """Pad texts on the right: input_ids and targets [B, T], where only tokens of the answer are targets.

        texts: token ids, and the number of tokens of the prompt that they begin with.
        """
        width = padded_width((len(ids) for ids, _ in texts), self.pad_multiple)
        input_ids = np.full((len(texts), width), self.pad_id, np.int64)
        targets = np.full((len(texts), width), IGNORE, np.int64)
        for i, (ids, prompt) in enumerate(texts):
            input_ids[i, : len(ids)] = ids
            first = max(prompt, 1)  # nothing predicts the first token of a text
            targets[i, first - 1 : len(ids) - 1] = ids[first:]
        return {"input_ids": torch.from_numpy(input_ids), "targets": torch.from_numpy(targets)}

    def token_logprobs(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """Log-probabilities of the targets: fp32 [B, T], 0 without a target."""
        return self.logprobs(model, {name: inputs[name] for name in ("input_ids", "targets")}, self.fused)

    def answer_logprobs(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """The log-probability of each answer: fp32 [B]."""
        return self.token_logprobs(model, inputs).sum(1)

    def reference_logprobs(self, model: torch.nn.Module, inputs: Inputs) -> torch.Tensor:
        """`answer_logprobs` of the reference, unless they are cached. model: the trained network."""
        if self.reference is not None:
            found: torch.Tensor = self.reference.forward(self.answer_logprobs, inputs)
            return found
        with torch.no_grad(), adapters_off(model):
            return self.answer_logprobs(model, inputs)
