"""A check that a network ignores padding: a row's outputs must not depend on the other rows of its batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from ptft_dist.errors import RecipeError

# Relative to the largest output; rounding in another order, or in 16 bits, gives smaller differences.
TOLERANCE = 3e-4
TOLERANCE_16_BITS = 0.05
ROWS, SHORT, LONG = 4, 8, 16

# They read padding in spite of the mask, but with random weights in 16 bits too little for the probe to detect.
_LEAKY = ("convbert", "nystromformer", "yoso")


def refuse_known(config: PretrainedConfig) -> None:
    """Raises RecipeError for networks that read padding but may pass the probe. BigBird's
    sparse attention is for long rows only: which blocks see each other follows from the padded width."""
    if config.model_type in _LEAKY:
        raise RecipeError(
            f"model: a {config.model_type} reads padding, so a row's loss would depend on the rows that share its "
            "batch: use another model_type"
        )
    if getattr(config, "attention_type", None) == "block_sparse":
        raise RecipeError(
            f"model: with the block-sparse attention of a {config.model_type}, a row's loss depends on how far it is "
            "padded: set model.config.attention_type: original_full, or in the config.json of model.path"
        )


@dataclass(frozen=True)
class PaddingProbe:
    """Compares short rows alone with the same rows padded to the width of a longer one.

    The outputs must be equal. Some architectures read padding without an error: FNet mixes all positions, XLNet
    classifies at the last one. So every run checks.

    outputs_of(network, inputs): [B, labels] or [B, T, labels]; inputs: ROWS short rows and a longer one; width: of the
    short rows alone; tolerance: relative to the largest output.
    """

    outputs_of: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]
    inputs: dict[str, torch.Tensor]
    width: int
    tolerance: float

    def outputs(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The short rows' outputs, padded and alone: [2, ROWS, ...]."""
        alone = {name: x[:ROWS, : self.width] for name, x in inputs.items()}
        try:
            outputs = self.outputs_of(model, inputs), self.outputs_of(model, alone)
        except (TypeError, ValueError, RuntimeError) as error:
            raise RecipeError(
                f"model: this network fails at made-up rows of {self.width} and {inputs['input_ids'].shape[1]} tokens "
                f"({error}): use another model_type"
            ) from error
        padded, plain = (x[:ROWS].float() for x in outputs)
        return torch.stack([padded[:, : plain.shape[1]], plain])

    def check(self, outputs: torch.Tensor) -> None:
        """Raises RecipeError if padding changed the outputs."""
        padded, alone = outputs
        moved = (padded - alone).abs().max().item()
        if not moved <= self.tolerance * alone.abs().max().item():
            raise RecipeError(
                "model: in this architecture, a row's outputs depend on how far it is padded, and so on the rows that "
                f"share its batch (padding moved its outputs by {moved:.2g}, the largest of which is "
                f"{alone.abs().max().item():.2g}): use another model_type; for XLNet, set model.config.summary_type: "
                "first"
            )
