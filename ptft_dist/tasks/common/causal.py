"""Next-token prediction, shared by causal language modelling and supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.isolation import (
    LEAK_TOLERANCE,
    PROBE_LENGTH,
    ROUNDING_TOLERANCE,
    check_isolation,
    probe_rows,
    restarting_positions,
)
from ptft_dist.tasks.common.losses import network_inputs, perplexity
from ptft_dist.tasks.common.padding import pad_id, pad_multiple, padded_width
from ptft_dist.tasks.common.router_loss import router_loss
from ptft_dist.tasks.protocol import IGNORE, BaseTask, Batch, LossOut, TaskSetup


class NextTokenTask(BaseTask):
    """The summed cross-entropy of next tokens."""

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
        """Add the fused head if the recipe wants it. The network's ordinary forward and generation do not change."""
        if self.fused:
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(model)

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]] = ()) -> Batch:  # noqa: ARG002
        """Pad on the right: input_ids, targets (targets[t] is the token after input_ids[t]) and, for packed rows
        with attention within documents, position_ids that restart at every document; all [B, T].

        Right padding needs no attention mask, because in a causal network no token sees later ones.
        """
        width = padded_width((len(row.input_ids) for row in rows), self.pad_multiple)
        input_ids = np.full((len(rows), width), self.pad_id, np.int64)
        targets = np.full((len(rows), width), IGNORE, np.int64)
        for i, row in enumerate(rows):
            n = len(row.input_ids)
            input_ids[i, :n] = row.input_ids
            targets[i, : n - 1] = self.next_tokens(row)
            if self.isolate:
                starts = row.document_starts
                # The last token of a document does not predict the first of the next one.
                targets[i, starts[starts > 0] - 1] = IGNORE
        inputs = {"input_ids": torch.from_numpy(input_ids), "targets": torch.from_numpy(targets)}
        if self.isolate:
            inputs["position_ids"] = torch.from_numpy(restarting_positions(rows, width))
        if self.balances_experts:
            inputs["targets_lengths"] = torch.tensor([len(row.input_ids) for row in rows])
        more_counts = (len(rows),) if self.balances_experts else ()
        tokens = sum(len(row.input_ids) for row in rows)
        return Batch(inputs, int((targets != IGNORE).sum()), tokens, more_counts)

    def next_tokens(self, row: Row) -> np.ndarray:
        """The target of each token but the last: int64 [T - 1], -100 without a label."""
        return row.input_ids[1:]

    def loss(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> LossOut:
        """loss_sum: the cross-entropy over tokens; [2] for a mixture of experts, with the weighted router loss."""
        if not self.balances_experts:
            return LossOut(-self.logprobs(model, inputs, self.fused).sum(), {})
        output = model(**network_inputs(inputs), use_cache=False, output_router_logits=True)
        tokens = F.cross_entropy(
            output.logits.flatten(0, 1).float(), inputs["targets"].flatten(), ignore_index=IGNORE, reduction="sum"
        )
        lengths = inputs["targets_lengths"]
        each = router_loss(output.router_logits or (), lengths, self.network.experts_per_token)
        balance, count = each.sum(), (lengths > 0).sum()
        return LossOut(
            torch.stack([tokens, self.network.router_loss_weight * balance]), {"router_loss": (balance.detach(), count)}
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
        everywhere = flat.new_zeros(targets.shape)
        everywhere[:, (targets != IGNORE).any(0)] = -flat.view(kept.shape)
        return everywhere

    def choices(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [B, P, V] and targets [B, P] at the P positions where any row has a target; on an accelerator at all T
        positions, because finding the positions would wait for the device."""
        targets, plain = inputs["targets"], network_inputs(inputs)
        if self.on_cpu and self.takes_positions:
            places = (targets != IGNORE).any(0).nonzero()[:, 0]
            if 0 < len(places) < targets.size(1):
                plain["logits_to_keep"], targets = places, targets[:, places]
        return model(**plain, use_cache=False).logits, targets

    def probe(self) -> CausalProbe:
        return CausalProbe(self)

    def eval_metrics(self, totals: dict[str, float]) -> dict[str, float]:
        """loss: mean negative log-likelihood in nats; perplexity: its exponential. The loss of a mixture of experts
        includes the weighted router loss; its perplexity does not."""
        likelihood = totals["loss"] - self.network.router_loss_weight * totals.get("router_loss", 0.0)
        return {**totals, "perplexity": perplexity(likelihood)}


@dataclass(frozen=True)
class CausalProbe:
    """Checks that no token sees later ones, that attention stays within documents, and that the fused head reproduces
    the logits. Some architectures fail one of these without an error."""

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
        ahead = (outputs[2, : PROBE_LENGTH - 1] - outputs[3, : PROBE_LENGTH - 1]).abs().max().item()
        # Both rows are computed alike, so the difference is exactly 0 in a causal network, in bf16 too.
        if not ahead <= LEAK_TOLERANCE * spread:
            raise RecipeError(
                f"model: in this {self.task.network.model_type} network a token sees the tokens after it (they moved "
                f"its log-probability by {ahead:.2g}), so task {name} would teach it to copy them. Use a decoder such "
                "as llama, qwen3 or gpt2; or train this network with task: mlm"
            )
        if self.task.isolate:
            check_isolation(outputs, spread, name)
        apart = (outputs[..., 0] - outputs[..., 1]).abs().max().item()
        if not apart <= ROUNDING_TOLERANCE * spread:
            raise RecipeError(
                f"{name}.head: the fused head does not reproduce this architecture's logits (log-probabilities differ "
                f"by {apart:.2g}): set {name}.head: logits"
            )
