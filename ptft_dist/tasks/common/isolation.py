"""Attention within the documents of a packed row: masks, positions, and a check that the network respects them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError

# Relative to the standard deviation of the outputs, which is small for freshly initialized weights.
LEAK_TOLERANCE = 1e-4  # the difference is exactly 0 if attention stays within documents
ROUNDING_TOLERANCE = 0.05  # another order of summation, or bf16, changes the outputs by about 0.01
PROBE_LENGTH = 8


def document_numbers(rows: Sequence[Row], width: int) -> np.ndarray:
    """The index of each token's document within its row: int64 [B, width], -1 for padding."""
    numbers = np.full((len(rows), width), -1, np.int64)
    for i, row in enumerate(rows):
        lengths = np.diff(row.document_starts, append=len(row.input_ids))
        numbers[i, : len(row.input_ids)] = np.repeat(np.arange(len(lengths)), lengths)
    return numbers


def restarting_positions(rows: Sequence[Row], width: int) -> np.ndarray:
    """Position ids that restart at every document: int64 [B, width]. Padding counts as a document."""
    positions = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        n, starts = len(row.input_ids), row.document_starts
        positions[i, :n] = np.arange(n) - np.repeat(starts, np.diff(starts, append=n))
        positions[i, n:] = np.arange(width - n)
    return positions


@dataclass(frozen=True)
class IsolationProbe:
    """Checks that attention stays within each document of a packed row.

    The same document is packed after two different documents, and at the start of a row. The network's outputs for it
    must be equal. Some architectures ignore the mask without an error, so every run checks.
    """

    outputs_of: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]
    """(network, inputs) -> outputs [B, T, ...]."""
    collate: Callable[[Sequence[Row]], dict[str, torch.Tensor]]
    """Rows -> inputs of the network."""
    vocab_size: int
    section: str
    """The task's section of the recipe, for messages."""

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return self.collate(probe_rows(self.vocab_size, isolated=True))

    def outputs(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        try:
            return self.outputs_of(model, inputs).float()
        except TypeError as error:
            raise RecipeError(
                f"{self.section}.attention: this architecture does not support attention within documents ({error}): "
                f"set {self.section}.packing: false, or {self.section}.attention: across"
            ) from None

    def check(self, outputs: torch.Tensor) -> None:
        check_isolation(outputs, outputs.std().item(), self.section)


def probe_rows(vocab_size: int, *, isolated: bool) -> list[Row]:
    """Four packed rows of two documents: first + second, third + second, second + first, second + third."""
    generator = torch.Generator().manual_seed(0)
    first, second, third = torch.randint(vocab_size, (3, PROBE_LENGTH), generator=generator)
    starts = np.array([0, PROBE_LENGTH] if isolated else [0])
    pairs = [(first, second), (third, second), (second, first), (second, third)]
    return [Row(torch.cat(pair).numpy(), starts) for pair in pairs]


def check_isolation(outputs: torch.Tensor, spread: float, section: str) -> None:
    """Check that a document's outputs do not depend on the other documents of its row.

    Args:
        outputs: [4, T, ...], of `probe_rows`.
        spread: their standard deviation.
        section: the task's section of the recipe, for messages.

    Raises:
        RecipeError: they depend on another document.
    """
    n = PROBE_LENGTH
    after_first, after_third, at_start = outputs[0, n:], outputs[1, n:], outputs[2, :n]
    leak = (after_first - after_third).abs().max().item()
    shift = (after_first - at_start).abs().max().item()
    if not (leak <= LEAK_TOLERANCE * spread and shift <= ROUNDING_TOLERANCE * spread):
        raise RecipeError(
            f"{section}.attention: in this architecture, tokens attend to other documents of a packed row (another "
            f"document changed their outputs by {max(leak, shift):.2g}): set {section}.packing: false, or "
            f"{section}.attention: across"
        )
