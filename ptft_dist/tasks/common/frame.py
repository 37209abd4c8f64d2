"""The special tokens that a tokenizer puts around a text, or around and between two of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ptft_dist.data.tokenizer import check_can_pad
from ptft_dist.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Frame:
    """[CLS] text [SEP], or [CLS] text [SEP] text [SEP], as this tokenizer has it: for texts that are split into several
    examples after tokenization.

    ids, types: the special tokens before the first text, (between the two,) and after the last; and their
    token_type_ids. text_types: the texts' own.
    """

    ids: tuple[list[int], ...]
    types: tuple[list[int], ...]
    text_types: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, backend: Any, texts: int) -> Frame:
        """backend: the tokenizer's own, in Rust. texts: 1 or 2.

        Raises:
            RecipeError: nothing can be learned with this tokenizer.
        """
        check_can_pad(tokenizer)
        probe = backend.encode(*["a"] * texts, add_special_tokens=True)
        frame = cls(
            tuple([] for _ in range(texts + 1)),
            tuple([] for _ in range(texts + 1)),
            tuple(probe.type_ids[probe.sequence_ids.index(i)] if i in probe.sequence_ids else -1 for i in range(texts)),
        )
        if -1 in frame.text_types:
            raise RecipeError("tokenizer: it has no token for the letter a. Use another one.")
        part = 0
        for token, kind, text in zip(probe.ids, probe.type_ids, probe.sequence_ids, strict=True):
            if text is None:
                frame.ids[part].append(token)
                frame.types[part].append(kind)
            else:
                part = text + 1
        return frame

    def __len__(self) -> int:
        """The number of special tokens."""
        return sum(map(len, self.ids))

    def fill(self, *texts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Token ids and token_type_ids of an example with these texts."""
        ids, types = list(self.ids[0]), list(self.types[0])
        for i, text in enumerate(texts):
            ids += [*text, *self.ids[i + 1]]
            types += [*[self.text_types[i]] * len(text), *self.types[i + 1]]
        return ids, types
