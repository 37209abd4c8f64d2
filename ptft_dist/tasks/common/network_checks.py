"""Checks that a second network fits the trained one, and that networks have room for a prompt with its response."""

from __future__ import annotations

from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.errors import RecipeError
from ptft_dist.networks.frozen import FrozenSource
from ptft_dist.tasks.protocol import TaskSetup


def check_same_tokens(setup: TaskSetup, source: FrozenSource) -> None:
    """Raises RecipeError if a token of the trained network has another id in the tokenizer of `source`, or none."""
    theirs = load_tokenizer(source.path, revision=source.section.revision, key=source.key).get_vocab()
    vocab = setup.tokenizer.get_vocab()
    if different := {token for token, i in vocab.items() if theirs.get(token) != i}:
        raise RecipeError(
            f"{source.key}: {source.path} has another vocabulary: {len(different):,} of {len(vocab):,} tokens are "
            "missing or have another id. Both networks must use the same tokenizer: set tokenizer.path to that of this "
            "one."
        )


def check_room(setup: TaskSetup, positions: int, described: str) -> None:
    """Raises RecipeError if prompt and response may have more tokens than there are positions."""
    longest = setup.max_length + setup.settings.sampling.max_new_tokens
    if positions < longest:
        raise RecipeError(
            f"{setup.name}.sampling.max_new_tokens: a prompt of data.max_length and its response have up to {longest} "
            f"tokens, more than {described}: lower one of them"
        )
