"""A check that two networks read the same token ids."""

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
