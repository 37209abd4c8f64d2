"""How many ids a tokenizer has."""

from __future__ import annotations

from typing import Any


def id_count(tokenizer: Any) -> int:
    """The largest id of a transformers tokenizer + 1: the embeddings that a network needs for it.

    More than its number of tokens if ids have no token, as after tokens were removed from its vocabulary.
    """
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
