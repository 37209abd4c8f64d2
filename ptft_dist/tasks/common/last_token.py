"""Reads a decoder's score at the last token of each row.

The sequence classification classes of transformers read it at the rightmost token that differs from
`config.pad_token_id`, and ignore the attention mask. If PAD is EOS, they skip a text's own EOS; virtual tokens move the
position.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HEADS = ("score", "classifier")


class LastToken:
    """Forward hook of a head: the logits of each row's last token, by the attention mask, at every position.

    Whatever position the network then reads, it gets these. A head whose input has no positions, as that of BERT, is
    left alone. Works inside of adapters and data-parallel wrappers, because it belongs to the head.
    """

    def __init__(self, *, only_virtual: bool = False) -> None:
        """only_virtual: where there are no virtual tokens, the network reads its own position."""
        self.mask: torch.Tensor | None = None  # [B, T], set before each forward pass
        self._only_virtual = only_virtual

    @classmethod
    def of(cls, model: PreTrainedModel, *, only_virtual: bool = False) -> LastToken:
        """Attach to the head of a sequence classification network, before anything wraps it."""
        hook = cls(only_virtual=only_virtual)
        for name in _HEADS:
            if isinstance(head := getattr(model, name, None), torch.nn.Linear):
                head.register_forward_hook(hook)
        return hook

    def __deepcopy__(self, _memo: dict[int, Any]) -> LastToken:
        return self  # peft trains a copy of the head; it reads the same mask

    def __call__(self, _head: torch.nn.Module, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        """logits: [B, V + T, labels], after V virtual tokens."""
        if self.mask is None or logits.dim() != 3:
            return logits
        virtual = logits.shape[1] - self.mask.shape[1]
        if self._only_virtual and not virtual:
            return logits
        ends = last_positions(self.mask) + virtual
        rows = torch.arange(len(logits), device=logits.device)
        return logits[rows, ends].unsqueeze(1).expand_as(logits)


def last_positions(mask: torch.Tensor) -> torch.Tensor:
    """The position of the last token of each row, with padding on either side: int64 [B]. mask: [B, T], 1: a token."""
    return mask.shape[1] - 1 - mask.flip(1).to(torch.int32).argmax(1)


def padding_token(tokenizer: PreTrainedTokenizerBase, last_ids: Collection[int]) -> int | None:
    """A special token that ends no text, for padding: PAD, EOS, BOS or another one. None: there is none.

    With this token as PAD, transformers reads the score of a text at its last token too.

    Args:
        last_ids: the special tokens that end texts.
    """
    special = sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    candidates = [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, *special]
    usable = (i for i in candidates if i is not None and i not in last_ids)
    return next((i for i in usable if i != tokenizer.unk_token_id or i == tokenizer.pad_token_id), None)
