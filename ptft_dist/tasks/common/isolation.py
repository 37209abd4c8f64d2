"""Attention within the documents of a packed row: masks, positions, and a check that the network respects them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ptft_dist.data.store import Row
from ptft_dist.errors import RecipeError

# As shares of the outputs' standard deviation, which is small while the weights are fresh.
LEAK_TOLERANCE = 1e-4  # a network with attention within documents gives exactly 0
ROUNDING_TOLERANCE = 0.05  # the same sums in another order, or in bf16, differ by about 0.01
PROBE_LENGTH = 8


def document_numbers(rows: Sequence[Row], width: int) -> np.ndarray:
    """The index of each token's document within its row; -1 for padding: int64 [B, width]."""
    numbers = np.full((len(rows), width), -1, np.int64)
    for i, row in enumerate(rows):
        lengths = np.diff(row.document_starts, append=len(row.input_ids))
        numbers[i, : len(row.input_ids)] = np.repeat(np.arange(len(lengths)), lengths)
    return numbers


def restarting_positions(rows: Sequence[Row], width: int) -> np.ndarray:
    """Positions that restart at every document; padding counts as a document: int64 [B, width]."""
    positions = np.zeros((len(rows), width), np.int64)
    for i, row in enumerate(rows):
        n, starts = len(row.input_ids), row.document_starts
        positions[i, :n] = np.arange(n) - np.repeat(starts, np.diff(starts, append=n))
        positions[i, n:] = np.arange(width - n)
    return positions


@dataclass(frozen=True)
class IsolationProbe:
    """Checks that attention stays within each document of a packed row.

    A document is packed after another one, after a third one, and at the start of a row; the network's outputs for it
    must be equal. Some architectures ignore the mask without an error, so every run checks.

    outputs_of(network, inputs): [B, T, ...]; collate: rows -> inputs.
    """

    outputs_of: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor]
    collate: Callable[[Sequence[Row]], dict[str, torch.Tensor]]
    vocab_size: int
    section: str

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return self.collate(probe_rows(self.vocab_size, isolated=True))

    def outputs(self, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        try:
            return self.outputs_of(model, inputs).float()
        except TypeError as error:
            raise RecipeError(
                f"{self.section}.attention: this architecture does not support such attention masks ({error}): set "
                f"{self.section}.packing: false, or accept it with {self.section}.attention: across"
            ) from None

    def check(self, outputs: torch.Tensor) -> None:
        check_isolation(outputs, outputs.std().item(), self.section)


def probe_rows(vocab_size: int, *, isolated: bool) -> list[Row]:
    """Four rows of two documents: first + second, third + second, second + first, second + third."""
    generator = torch.Generator().manual_seed(0)
    first, second, third = torch.randint(vocab_size, (3, PROBE_LENGTH), generator=generator)
    starts = np.array([0, PROBE_LENGTH] if isolated else [0])
    pairs = [(first, second), (third, second), (second, first), (second, third)]
    return [Row(torch.cat(pair).numpy(), starts) for pair in pairs]


def check_isolation(outputs: torch.Tensor, spread: float, section: str) -> None:
    """outputs [4, T, ...] for probe_rows; spread: their standard deviation. Raises RecipeError if they depend
    on other documents of the row."""
    n = PROBE_LENGTH
    behind_first, behind_third, alone = outputs[0, n:], outputs[1, n:], outputs[2, :n]
    leak = (behind_first - behind_third).abs().max().item()
    moved = (behind_first - alone).abs().max().item()
    if not (leak <= LEAK_TOLERANCE * spread and moved <= ROUNDING_TOLERANCE * spread):
        raise RecipeError(
            f"{section}.attention: in this architecture the documents of a packed row see each other (one changed the "
            f"next one's outputs by {max(leak, moved):.2g}): set {section}.packing: false, or accept it with "
            f"{section}.attention: across"
        )
