"""Padded batches of documents for a network whose tokens see each other in both directions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ptft_dist.data.store import Row
from ptft_dist.networks.facts import NetworkFacts
from ptft_dist.tasks.common.isolation import document_numbers, restarting_positions
from ptft_dist.tasks.common.padding import pad_id, pad_multiple, padded_width
from ptft_dist.tasks.protocol import TaskSetup


class PaddedRows:
    """Pads rows of documents, with the attention mask and the positions that this network needs."""

    def __init__(self, setup: TaskSetup, network: NetworkFacts, device: torch.device) -> None:
        self.isolate, self.pad_id = setup.settings.isolated, pad_id(setup.tokenizer.pad_token_id)
        self.pad_multiple, self.position_offset = pad_multiple(device), network.position_offset
        self.has_mask = self.isolate or network.takes("attention_mask")
        # FNet has no attention mask and reads padding: pad all rows to one width, so that none depends on the others.
        self.least_width = 0 if self.has_mask else setup.max_length

    def inputs(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """input_ids [B, T]; attention_mask [B, T] (True: a token), or for packed rows [B, 1, T, T] (True: same
        document) with position_ids [B, T]."""
        width = padded_width((self.least_width, *(len(row.input_ids) for row in rows)), self.pad_multiple)
        input_ids = np.full((len(rows), width), self.pad_id, np.int64)
        for i, row in enumerate(rows):
            input_ids[i, : len(row.input_ids)] = row.input_ids
        inputs = {"input_ids": torch.from_numpy(input_ids)}
        numbers = document_numbers(rows, width)  # -1: padding
        if self.isolate:
            inputs["position_ids"] = torch.from_numpy(restarting_positions(rows, width) + self.position_offset)
            inputs["attention_mask"] = torch.from_numpy(numbers[:, None, :, None] == numbers[:, None, None, :])
        elif self.has_mask:
            inputs["attention_mask"] = torch.from_numpy(numbers >= 0)
        return inputs
