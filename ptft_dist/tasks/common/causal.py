"""Next-token prediction, shared by causal language modelling and supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from ptft_dist.config.recipe import ModelSection
from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.adapt.switching import computes_logits_by_weight
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.isolation import (
    LEAK_TOLERANCE,
    PROBE_LENGTH,
    ROUNDING_TOLERANCE,
    check_isolation,
    probe_rows,
    restarting_positions,
)
from ptft_dist.tasks.common.losses import network_inputs, perplexity, row_losses
from ptft_dist.tasks.common.padding import pad_id, pad_multiple, padded_width
from ptft_dist.tasks.common.router_loss import router_loss
from ptft_dist.tasks.protocol import IGNORE, BaseTask, Batch, LossOut, TaskSetup


class NextTokenTask(BaseTask):
    """Base class of next-token prediction: rows of token ids -> summed cross-entropy."""

    auto_class = AutoModelForCausalLM
    adds_router_loss = True

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        super().__init__(setup, network, device)
        self.vocab_size, self.pad_id = len(setup.tokenizer), pad_id(setup.tokenizer.pad_token_id)
        self.isolate, self.on_cpu = self.settings.isolated, device.type == "cpu"
        self.balances_experts = network.router_loss_weight > 0
        if self.balances_experts and self.settings.head == "fused":
            raise RecipeError(
                f"{setup.name}.head: the fused head gives no router logits, which the router loss of this "
                f"{network.model_type} network needs: set {setup.name}.head: logits"
            )
        on_accelerator = self.settings.head == "auto" and not self.on_cpu and not self.balances_experts
        self.fused = self.settings.head == "fused" or on_accelerator
        self.takes_positions = network.takes("logits_to_keep")
        self.pad_multiple = pad_multiple(device)

    def prepare_network(self, model: PreTrainedModel) -> None:
        """Add the fused head if the recipe selects it. The ordinary forward pass and generation do not change."""
        if self.fused:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(model)

    def extend_network(self, model: Any, section: ModelSection) -> None:
        """Use the logits where the fused head would pass over a part of the adapter, unless it is asked for."""
        super().extend_network(model, section)
        if not self.fused or computes_logits_by_weight(model):
            return
        if self.settings.head == "fused":
            raise RecipeError(
                f"{self.setup.name}.head: fused multiplies with the weight of the output head, and model.adapt changes "
                f"more than that, so the loss would be another one: set {self.setup.name}.head: logits"
            )
        self.fused = False

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """Pad rows on the right: input_ids and targets [B, T], where targets[t] is the token after input_ids[t].

        Packed rows with attention within documents also get position_ids [B, T] that restart at every document. Right
        padding needs no attention mask, because a token of a causal network does not attend to later tokens.
        """
        width = padded_width((len(row.input_ids) for row in rows), self.pad_multiple)
        input_ids = np.full((len(rows), width), self.pad_id, np.int64)
        targets = np.full((len(rows), width), IGNORE, np.int64)
        for i, row in enumerate(rows):
            n = len(row.input_ids)
            input_ids[i, :n] = row.input_ids
            targets[i, : n - 1] = self._targets(row)
        inputs = {"input_ids": torch.from_numpy(input_ids), "targets": torch.from_numpy(targets)}
        if self.isolate:
            inputs["position_ids"] = torch.from_numpy(restarting_positions(rows, width))
        if self.balances_experts:
            inputs["targets_lengths"] = torch.tensor([len(row.input_ids) for row in rows])
        more_counts = (len(rows),) if self.balances_experts else ()
        tokens = sum(len(row.input_ids) for row in rows)
        return Batch(inputs, int((targets != IGNORE).sum()), tokens, more_counts)

    def _targets(self, row: Row) -> np.ndarray:
        targets = self.next_tokens(row)
        if not self.isolate:
            return targets
        # The last token of a document does not predict the first of the next one.
        starts = row.document_starts
        targets = targets.copy()
        targets[starts[starts > 0] - 1] = IGNORE
        return targets

    def target_ids(self, row: Row) -> np.ndarray:
        targets = self._targets(row)
        return targets[targets != IGNORE]

    def before_targets(self, row: Row) -> np.ndarray:
        return row.input_ids[np.flatnonzero(self._targets(row) != IGNORE)[:1]]

    def next_tokens(self, row: Row) -> np.ndarray:
        """The targets of all tokens except the last: int64 [T - 1], -100 without a label."""
        return row.input_ids[1:]

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """The summed cross-entropy: a scalar; for a mixture of experts [2], with the weighted router loss."""
        targets = inputs["targets"]
        if not self.balances_experts:
            logprobs = self.logprobs(model, inputs, self.fused)
            return LossOut(-logprobs.sum(), {}, row_losses=row_losses(-logprobs.detach(), targets))
        output = model(**network_inputs(inputs), use_cache=False, output_router_logits=True)
        tokens = F.cross_entropy(
            output.logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE, reduction="none"
        )
        lengths = inputs["targets_lengths"]
        balances = router_loss(output.router_logits or (), lengths, self.network.experts_per_token)
        balance, count = balances.sum(), (lengths > 0).sum()
        return LossOut(
            torch.stack([tokens.sum(), self.network.router_loss_weight * balance]),
            {"router_loss": (balance.detach(), count)},
            row_losses=row_losses(tokens.detach().view(targets.shape), targets),
        )

    def loss_of(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The summed cross-entropy and the number of targets; used by distillation."""
        flat = logits.reshape(-1, logits.size(-1)).float()
        loss_sum = F.cross_entropy(flat, targets.reshape(-1), ignore_index=IGNORE, reduction="sum")
        return loss_sum, (targets != IGNORE).sum()

    def logprobs(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor], fused: bool) -> torch.Tensor:
        """log p(targets[t] | tokens up to t): fp32 [B, T], 0 without a target."""
        targets = inputs["targets"]
        if fused:
            output = model(**network_inputs(inputs), shift_labels=targets, fused_lm_head=True)
            logprobs: torch.Tensor = output.log_probs
            return logprobs
        logits, kept = self.choices(model, inputs)
        flat = F.cross_entropy(
            logits.reshape(-1, logits.size(-1)).float(), kept.reshape(-1), ignore_index=IGNORE, reduction="none"
        )
        if kept.shape == targets.shape:
            return -flat.view(targets.shape)
        logprobs = flat.new_zeros(targets.shape)
        logprobs[:, (targets != IGNORE).any(0)] = -flat.view(kept.shape)
        return logprobs

    def choices(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, P, V] and targets [B, P] at the P positions where any row has a target.

        On an accelerator, P is T: finding the positions would wait for the device.
        """
        targets, plain = inputs["targets"], network_inputs(inputs)
        if self.on_cpu and self.takes_positions:
            places = (targets != IGNORE).any(0).nonzero()[:, 0]
            if 0 < len(places) < targets.size(1):
                plain["logits_to_keep"], targets = places, targets[:, places]
        return model(**plain, use_cache=False).logits, targets

    def probe(self) -> CausalProbe:
        return CausalProbe(self)

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """Add the perplexity. loss: mean negative log-likelihood in nats; perplexity: its exponential.

        The loss of a mixture of experts includes the weighted router loss. Its perplexity does not.
        """
        likelihood = totals["loss"] - self.network.router_loss_weight * totals.get("router_loss", 0.0)
        return {**totals, "perplexity": perplexity(likelihood)}


@dataclass(frozen=True)
class CausalProbe:
    """Checks the network before training, because some architectures fail these checks without an error.

    No token may attend to later tokens. Attention must stay within the documents of a packed row. The fused head must
    reproduce the logits.
    """

    task: NextTokenTask

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        rows = probe_rows(self.task.vocab_size, isolated=self.task.isolate)
        return NextTokenTask.collate(self.task, [Row(row.input_ids, row.document_starts) for row in rows]).inputs

    def outputs(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Log-probabilities [4 rows, T, 2 heads]; without a fused head, both are the same."""
        plain = self.task.logprobs(model, inputs, fused=False)
        fused = self.task.logprobs(model, inputs, fused=True) if self.task.fused else plain
        return torch.stack([plain.float(), fused.float()], dim=-1)

    def check(self, outputs: torch.Tensor) -> None:
        name, spread = self.task.setup.name, outputs[outputs != 0].std().item()
        # Rows 2 and 3 begin with the same tokens; the last of these has another target.
        leak = (outputs[2, : PROBE_LENGTH - 1] - outputs[3, : PROBE_LENGTH - 1]).abs().max().item()
        # Both rows use the same operations, so the difference is exactly 0 in a causal network, also in bf16.
        if not leak <= LEAK_TOLERANCE * spread:
            raise RecipeError(
                f"model: this {self.task.network.model_type} network is not causal: a token attends to later tokens "
                f"(they changed its log-probability by {leak:.2g}), so task {name} would teach it to copy them. Use a "
                "decoder such as llama, qwen3 or gpt2; or train this network with task: mlm"
            )
        if self.task.isolate:
            check_isolation(outputs, spread, name)
        difference = (outputs[..., 0] - outputs[..., 1]).abs().max().item()
        if not difference <= ROUNDING_TOLERANCE * spread:
            raise RecipeError(
                f"{name}.head: the fused head does not reproduce this architecture's logits (log-probabilities differ "
                f"by {difference:.2g}): set {name}.head: logits"
            )
