"""The parts of AdaLoRA that peft leaves to the training loop (Zhang et al. 2023).

peft adds the orthogonality penalty only to losses that the network itself computes, changes the ranks only when it is
called, and keeps the importance of each singular value outside of the network's state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from peft import AdaLoraModel, PeftModel

IN_PEFT = "base_model.model."
"""Precedes the names of the tuner's network in those of the peft model."""


class Orthogonality:
    """The penalty weight x mean over all A and B of ||A A^T - I||, Frobenius norm (equation 6)."""

    def __init__(self, model: PeftModel) -> None:
        config: Any = model.active_peft_config
        self.weight = config.orth_reg_weight
        self.count = sum("lora_A" in name or "lora_B" in name for name, _ in model.named_parameters())

    def term(self, name: str, parameter: torch.Tensor) -> torch.Tensor | None:
        if "lora_A" in name:
            product = parameter @ parameter.T
        elif "lora_B" in name:
            product = parameter.T @ parameter
        else:
            return None
        distance = torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device))
        return self.weight / self.count * distance


class RankState(torch.nn.Module):
    """Which ranks AdaLoRA keeps: a WeightRule of the engine that sets singular values without a rank to zero.

    What it remembers are buffers in fp32, so that checkpoints contain it: `step`, and for every A, E and B averages of
    importance and uncertainty (equations 9 and 10); for every E which ranks are kept, once this is `decided`.
    """

    step: torch.Tensor
    decided: torch.Tensor

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        tuner: Any = model.base_model
        self.tuner = [tuner]  # in a list, because a module that is an attribute would be its child
        self.keys: dict[str, str] = {}
        """Name of a parameter as the tuner names it -> what the names of its buffers begin with."""
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("decided", torch.zeros((), dtype=torch.bool))
        for name, parameter in tuner.model.named_parameters():
            if any(f"lora_{part}." in name for part in "AEB"):
                key = self.keys[name] = f"p{len(self.keys)}"
                self.register_buffer(f"{key}_importance", torch.zeros_like(parameter, dtype=torch.float32))
                self.register_buffer(f"{key}_uncertainty", torch.zeros_like(parameter, dtype=torch.float32))
                if "lora_E." in name:
                    self.register_buffer(f"{key}_kept", torch.ones(len(parameter), dtype=torch.bool))
        self.names = [IN_PEFT + name for name in self.keys]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RankState:
        """Keep the data types where a library converts the whole network, as DeepSpeed does to bf16."""
        super()._apply(lambda buffer: fn(buffer).to(buffer.dtype), recurse)
        return self

    def after_step(
        self, weights: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Update the importance from the gradients; return all E, with zeros where a rank is not kept."""
        (tuner,) = self.tuner
        allocator, config = tuner.rankallocator, tuner.peft_config[tuner.trainable_adapter_name]
        allocator.exp_avg_ipt = {name: self._buffer(name, "importance") for name in self.keys}
        allocator.exp_avg_unc = {name: self._buffer(name, "uncertainty") for name in self.keys}
        allocator.ipt = dict.fromkeys(self.keys, torch.zeros(()))
        self.set_rank_pattern()
        step = int(self.step) + 1
        last = step >= config.total_step - config.tfinal
        copies = _Copies(weights, gradients)
        # The tuner with complete copies of its parameters, which may be sharded.
        complete: Any = SimpleNamespace(
            model=copies,
            rankallocator=allocator,
            peft_config=tuner.peft_config,
            trainable_adapter_name=tuner.trainable_adapter_name,
        )
        AdaLoraModel.update_and_allocate(complete, step)
        self.step.fill_(step)
        for name in self.keys if allocator.exp_avg_ipt else ():
            self._buffer(name, "importance").copy_(allocator.exp_avg_ipt[name])
            self._buffer(name, "uncertainty").copy_(allocator.exp_avg_unc[name])
        if last and not self.decided:
            self.decided.fill_(True)
            for name, kept in config.rank_pattern.items():
                self._buffer(name, "kept").copy_(torch.tensor(kept))
        return {IN_PEFT + name: copy for name, copy in copies.named_parameters() if "lora_E." in name}

    def set_rank_pattern(self) -> None:
        """Give peft the decided ranks, which it applies from then on and exports.

        Until then all ranks are exported. peft's last allocation would cut those that have grown since, and is not that
        of an earlier checkpoint.
        """
        (tuner,) = self.tuner
        kept = {name: self._buffer(name, "kept").tolist() for name in self.keys if "lora_E." in name}
        tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = kept if self.decided else None

    def _buffer(self, name: str, what: str) -> torch.Tensor:
        buffer: torch.Tensor = getattr(self, f"{self.keys[name]}_{what}")
        return buffer


class _Copies:
    """What peft's allocation of ranks needs of a network: parameters with gradients, as the tuner names them."""

    def __init__(self, weights: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
        self._parameters: dict[str, torch.Tensor] = {}
        for name, weight in weights.items():
            copy = self._parameters[name.removeprefix(IN_PEFT)] = weight.clone()
            copy.grad = gradients[name]

    def named_parameters(self) -> Iterable[tuple[str, torch.Tensor]]:
        return self._parameters.items()
