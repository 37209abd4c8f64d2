"""Batches of masked rows: shared by masked language modelling with and without sentence pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ptft_dist.data.store import Row
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.losses import POSITIONS, target_positions
from ptft_dist.tasks.common.masking import Masker
from ptft_dist.tasks.common.padded_rows import PaddedRows
from ptft_dist.tasks.protocol import IGNORE, Batch, TaskSetup


class MaskedRows:
    """Pads rows and masks their tokens."""

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        """Raises RecipeError if the tokenizer has no mask token."""
        self.seed, self.masker, self.padded = setup.seed, Masker(setup), PaddedRows(setup, network, device)

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """The inputs of PaddedRows with masked input_ids; targets [B, T] (the original ids where masked, else -100);
        target_positions. The mask is a pure function of (seed, epoch, row)."""
        inputs = self.padded.inputs(rows)
        input_ids = inputs["input_ids"].numpy()
        targets = np.full(input_ids.shape, IGNORE, np.int64)
        for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
            n = len(row.input_ids)
            input_ids[i, :n], targets[i, :n] = self.masker.mask(row.input_ids, np.random.default_rng((self.seed, *key)))
        inputs |= {"targets": torch.from_numpy(targets), POSITIONS: target_positions(targets)}
        return Batch(inputs, int((targets != IGNORE).sum()), sum(len(row.input_ids) for row in rows))
