"""The parts of AdaLoRA that peft leaves to the training loop (Zhang et al. 2023).

peft adds the orthogonality penalty only to losses that the network itself computes, changes the ranks only when it is
called, and keeps the importance of each singular value outside of the network's state.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel


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
    """What the allocation of ranks remembers, as buffers, so that checkpoints contain it.

    Buffers: `step`, and for every A, E and B averages of importance and uncertainty (equations 9 and 10); for every E
    which ranks are kept, once this is decided.
    """

    step: torch.Tensor
    decided: torch.Tensor

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        tuner: Any = model.base_model
        self.tuner = [tuner]  # in a list, because a module that is an attribute would be its child
        self.names: dict[str, str] = {}
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.register_buffer("decided", torch.zeros((), dtype=torch.bool))
        for name, parameter in tuner.model.named_parameters():
            if any(f"lora_{part}." in name for part in "AEB"):
                key = self.names[name] = f"p{len(self.names)}"
                self.register_buffer(f"{key}_importance", torch.zeros_like(parameter))
                self.register_buffer(f"{key}_uncertainty", torch.zeros_like(parameter))
                if "lora_E." in name:
                    self.register_buffer(f"{key}_kept", torch.ones(len(parameter), dtype=torch.bool))

    def after_step(self) -> None:
        """Update the importance from the gradients, and set singular values without a rank to zero."""
        (tuner,) = self.tuner
        allocator, config = tuner.rankallocator, tuner.peft_config[tuner.trainable_adapter_name]
        allocator.exp_avg_ipt = {name: self._buffer(name, "importance") for name in self.names}
        allocator.exp_avg_unc = {name: self._buffer(name, "uncertainty") for name in self.names}
        allocator.ipt = dict.fromkeys(self.names, torch.zeros(()))
        self.set_rank_pattern()
        step = int(self.step) + 1
        last = step >= config.total_step - config.tfinal
        tuner.update_and_allocate(step)
        self.step.fill_(step)
        for name in self.names if allocator.exp_avg_ipt else ():
            self._buffer(name, "importance").copy_(allocator.exp_avg_ipt[name])
            self._buffer(name, "uncertainty").copy_(allocator.exp_avg_unc[name])
        if last and not self.decided:
            self.decided.fill_(True)
            for name, kept in config.rank_pattern.items():
                self._buffer(name, "kept").copy_(torch.tensor(kept))

    def set_rank_pattern(self) -> None:
        """Give peft the decided ranks, which it applies from then on and exports."""
        (tuner,) = self.tuner
        if self.decided:
            kept = {name: self._buffer(name, "kept").tolist() for name in self.names if "lora_E." in name}
            tuner.peft_config[tuner.trainable_adapter_name].rank_pattern = kept

    def _buffer(self, name: str, what: str) -> torch.Tensor:
        buffer: torch.Tensor = getattr(self, f"{self.names[name]}_{what}")
        return buffer
