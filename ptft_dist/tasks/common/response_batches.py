"""Collates prompts and responses into tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ptft_dist.data.store import Row
from ptft_dist.rl.rollout import Prompt
from ptft_dist.tasks.common.generation import left_padded
from ptft_dist.tasks.protocol import IGNORE


def padded_responses(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], pad_id: int, multiple: int, position_offset: int
) -> dict[str, torch.Tensor]:
    """Pad prompts on the left and responses on the right, so that all responses begin in the same column.

    Args:
        multiple: P and R are multiples of it.
        position_offset: the position id of a row's first token.

    Returns:
        input_ids, attention_mask and position_ids [B, P + R], and targets [B, R]: the response tokens, -100 at padding.
    """
    inputs = left_padded(prompts, pad_id, multiple)
    width = -(-max(map(len, responses)) // multiple) * multiple
    targets = np.full((len(responses), width), IGNORE, np.int64)
    for i, response in enumerate(responses):
        targets[i, : len(response)] = response
    padded = torch.from_numpy(targets)
    ids = torch.cat([inputs["input_ids"], padded.where(padded != IGNORE, pad_id)], 1)
    mask = torch.cat([inputs["attention_mask"], (padded != IGNORE).long()], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0) + position_offset
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "targets": padded}


def padded_columns(rows: Sequence[Row], names: Sequence[str], width: int) -> dict[str, torch.Tensor]:
    """Columns with one number for each response token, padded with 0: name -> fp32 [B, width]."""
    columns = {}
    for name in names:
        padded = np.zeros((len(rows), width), np.float32)
        for i, row in enumerate(rows):
            padded[i, : len(row.columns[name])] = row.columns[name]
        columns[name] = torch.from_numpy(padded)
    return columns


def as_bytes(values: Sequence[Any]) -> torch.Tensor:
    """JSON values as uint8 [B, L], since batches consist of tensors. Padded with zeros, which JSON does not contain."""
    texts = [json.dumps(value).encode() for value in values]
    width = max(map(len, texts))
    return torch.tensor([list(text.ljust(width, b"\0")) for text in texts], dtype=torch.uint8)


def from_bytes(rows: torch.Tensor) -> list[Any]:
    """The values of `as_bytes`."""
    return [json.loads(bytes(row).rstrip(b"\0")) for row in rows.tolist()]


def prompt_of(row: Row, number: int) -> Prompt:
    """The prompt of a row of `PromptRows`. number: of the row in its store."""
    return Prompt(number, row.input_ids, row.meta["prompt"], row.meta["columns"], row.meta.get("tools"))
