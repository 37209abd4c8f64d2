"""A check that the network ignores padding: a row's outputs must not depend on the other rows of its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from ptft_dist.errors import RecipeError

# Relative to the largest output; another order of summation, or 16-bit precision, gives smaller differences.
TOLERANCE = 3e-4
TOLERANCE_16_BITS = 0.05
ROWS, SHORT, LONG = 4, 8, 16

# These read padding despite the mask; with random weights in 16 bits the effect is too small for the probe to detect.
_LEAKY = ("convbert", "nystromformer", "yoso")


def refuse_known(config: PretrainedConfig) -> None:
    """Raises RecipeError for networks that read padding but may pass the probe.

    BigBird's sparse attention starts at long rows only, and the padded width decides which blocks attend to each other.
    """
    if config.model_type in _LEAKY:
        raise RecipeError(
            f"model: a {config.model_type} network reads padding, so a row's loss would depend on the other rows of "
            "its batch: use another model_type"
        )
    if getattr(config, "attention_type", None) == "block_sparse":
        raise RecipeError(
            f"model: with the block-sparse attention of {config.model_type}, a row's loss depends on its padding: set "
            "attention_type: original_full in model.config, or in the config.json of model.path"
        )


@dataclass(frozen=True)
class PaddingProbe:
    """Checks that short rows have equal outputs with and without padding to the width of a longer row.

    Some architectures read padding without an error: FNet mixes all positions, XLNet classifies at the last one. So
    every run checks.
    """

    outputs_of: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]
    """(network, inputs) -> outputs [B, labels] or [B, T, labels]."""
    inputs: dict[str, torch.Tensor]
    """ROWS short rows and a longer one."""
    width: int
    """Width of the short rows without padding."""
    tolerance: float
    """Relative to the largest output."""

    def outputs(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The outputs of the short rows with and without padding: [2, ROWS, ...]."""
        unpadded = {name: x[:ROWS, : self.width] for name, x in inputs.items()}
        try:
            outputs = self.outputs_of(model, inputs), self.outputs_of(model, unpadded)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RecipeError(
                f"model: this network fails at test rows of {self.width} and {inputs['input_ids'].shape[1]} tokens "
                f"({error}): use another model_type"
            ) from error
        padded, plain = (x[:ROWS].float() for x in outputs)
        return torch.stack([padded[:, : plain.shape[1]], plain])

    def check(self, outputs: torch.Tensor) -> None:
        """Raises RecipeError if padding changed the outputs."""
        padded, unpadded = outputs
        difference, largest = (padded - unpadded).abs().max().item(), unpadded.abs().max().item()
        if not difference <= self.tolerance * largest:
            raise RecipeError(
                "model: in this architecture, a row's outputs depend on its padding, and so on the other rows of its "
                f"batch (padding changed them by {difference:.2g}; the largest output is {largest:.2g}): use another "
                "model_type; for XLNet, set model.config.summary_type: first"
            )
