"""Batches of masked rows: shared by masked language modelling with and without sentence pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ptft_dist.data.store import Row
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.isolation import document_numbers, restarting_positions
from ptft_dist.tasks.common.losses import POSITIONS, target_positions
from ptft_dist.tasks.common.masking import Masker
from ptft_dist.tasks.common.padding import pad_id, pad_multiple, padded_width
from ptft_dist.tasks.protocol import IGNORE, Batch, TaskSetup


class MaskedRows:
    """Masks and pads rows, with the attention mask and positions that this network needs."""

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        """Raises RecipeError if the tokenizer has no mask token."""
        self.seed, self.masker = setup.seed, Masker(setup)
        self.isolate, self.pad_id = setup.settings.isolated, pad_id(setup.tokenizer.pad_token_id)
        self.pad_multiple, self.position_offset = pad_multiple(device), network.position_offset
        self.has_mask = self.isolate or network.takes("attention_mask")
        # FNet has no attention mask and reads padding: pad all rows to one width, so that none depends on the others.
        self.least_width = 0 if self.has_mask else setup.max_length

    def collate(self, rows: Sequence[Row], keys: Sequence[tuple[int, int]]) -> Batch:
        """Masked input_ids and targets (the original ids where masked, else -100), both [B, T]; target_positions;
        attention_mask [B, T] (True: a token), or for packed rows [B, 1, T, T] (True: same document) with position_ids.
        The mask is a pure function of (seed, epoch, row)."""
        width = padded_width((self.least_width, *(len(row.input_ids) for row in rows)), self.pad_multiple)
        input_ids = np.full((len(rows), width), self.pad_id, np.int64)
        targets = np.full((len(rows), width), IGNORE, np.int64)
        for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
            n = len(row.input_ids)
            random = np.random.default_rng((self.seed, *key))
            input_ids[i, :n], targets[i, :n] = self.masker.mask(row.input_ids, random)
        inputs = {
            "input_ids": torch.from_numpy(input_ids),
            "targets": torch.from_numpy(targets),
            POSITIONS: target_positions(targets),
        }
        numbers = document_numbers(rows, width)  # -1: padding
        if self.isolate:
            inputs["position_ids"] = torch.from_numpy(restarting_positions(rows, width) + self.position_offset)
            inputs["attention_mask"] = torch.from_numpy(numbers[:, None, :, None] == numbers[:, None, None, :])
        elif self.has_mask:
            inputs["attention_mask"] = torch.from_numpy(numbers >= 0)
        return Batch(inputs, int((targets != IGNORE).sum()), sum(len(row.input_ids) for row in rows))

    def unmasked(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """The inputs of `collate` without masked tokens."""
        inputs = self.collate(rows, [(0, i) for i in range(len(rows))]).inputs
        original = torch.where(inputs["targets"] != IGNORE, inputs["targets"], inputs["input_ids"])
        return {**inputs, "input_ids": original}
