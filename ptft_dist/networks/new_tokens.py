"""Embeddings of tokens that are added to a pretrained network, initialized from those of their pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from ptft_dist.networks.facts import input_embedding

Start = Literal["pieces", "mean", "random"]


@dataclass(frozen=True)
class NewTokens:
    """The tokens that were added to a tokenizer, and how their embeddings start."""

    pieces: Mapping[int, Sequence[int]]
    """Token id -> the ids into which the tokenizer split its text before; empty if it could not encode it."""
    start: Start

    def tables(self, model: PreTrainedModel) -> list[torch.nn.Parameter]:
        """What `initialize` changes: input embeddings, and weight and bias of an output head over the vocabulary."""
        modules: list[Any] = [input_embedding(model), model.get_output_embeddings()]
        named = [getattr(module, name, None) for module in modules for name in ("weight", "bias")]
        return list({id(table): table for table in named if isinstance(table, torch.nn.Parameter)}.values())

    def initialize(self, tables: Sequence[torch.nn.Parameter]) -> None:
        """Set the rows of the new tokens in each table, [V, H] or [V].

        `pieces`: the mean of the rows of the token's pieces, computed in fp32; of all old tokens if there are none.
        `mean`: the mean of the rows of all old tokens. `random`: nothing is changed.
        """
        if self.start == "random" or not self.pieces:
            return
        new = sorted(self.pieces)
        for table in tables:
            rows = table.detach()
            old = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            old[[*new, *range(new[-1] + 1, len(rows))]] = False  # rows after the last token are padding
            mean = rows[old].float().mean(0)
            pieces = [self._old_pieces(token) if self.start == "pieces" else [] for token in new]
            values = [rows[ids].float().mean(0) if ids else mean for ids in pieces]
            with torch.no_grad():
                table[new] = torch.stack(values).to(table.dtype)

    def _old_pieces(self, token: int) -> list[int]:
        """The pieces of a new token. A piece that is new too stands for its own pieces."""
        nested = (self._old_pieces(piece) if piece in self.pieces else [piece] for piece in self.pieces[token])
        return [piece for pieces in nested for piece in pieces]
