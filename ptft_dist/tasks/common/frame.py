"""The special tokens that a tokenizer adds around one text, or around and between two texts."""

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
    """A tokenizer's format of one or two texts, such as [CLS] text [SEP] or [CLS] text [SEP] text [SEP].

    Used for texts that are split into several examples after tokenization.
    """

    ids: tuple[list[int], ...]
    """The special tokens before the first text, between two texts, and after the last text."""
    types: tuple[list[int], ...]
    """The token_type_ids of `ids`."""
    text_types: tuple[int, ...]
    """The token_type_id of each text's tokens."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, backend: Any, texts: int) -> Frame:
        """The frame of a tokenizer.

        Args:
            backend: the `tokenizers.Tokenizer` of the tokenizer.
            texts: number of texts, 1 or 2.

        Raises:
            RecipeError: the tokenizer has neither PAD nor EOS, or no token for the letter a.
        """
        check_can_pad(tokenizer)
        probe = backend.encode(*["a"] * texts, add_special_tokens=True)
        frame = cls(
            tuple([] for _ in range(texts + 1)),
            tuple([] for _ in range(texts + 1)),
            tuple(probe.type_ids[probe.sequence_ids.index(i)] if i in probe.sequence_ids else -1 for i in range(texts)),
        )
        if -1 in frame.text_types:
            raise RecipeError("tokenizer: it has no token for the letter a. Use another tokenizer.")
        part = 0
        for token, token_type, text in zip(probe.ids, probe.type_ids, probe.sequence_ids, strict=True):
            if text is None:
                frame.ids[part].append(token)
                frame.types[part].append(token_type)
            else:
                part = text + 1
        return frame

    def unmarked(self) -> list[str]:
        """A warning for the data report if there is no token between two texts, as with GPT-2 and Qwen."""
        if len(self.ids) < 3 or self.ids[1]:
            return []
        return [
            "tokenizer: it puts no token between the two texts of a row, so the network cannot tell where the first "
            "ends. End the first texts with a separator of your own, or use a model whose tokenizer has one, such as "
            "BERT's"
        ]

    def __len__(self) -> int:
        """The number of special tokens."""
        return sum(map(len, self.ids))

    def fill(self, *texts: Sequence[int]) -> tuple[list[int], list[int]]:
        """Token ids and token_type_ids of an example: the texts with the special tokens around them."""
        ids, types = list(self.ids[0]), list(self.types[0])
        for i, text in enumerate(texts):
            ids += [*text, *self.ids[i + 1]]
            types += [*[self.text_types[i]] * len(text), *self.types[i + 1]]
        return ids, types
