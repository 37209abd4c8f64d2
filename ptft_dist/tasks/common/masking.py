"""Masking of tokens, shared by masked language modelling with and without sentence pairs.

Devlin et al. 2019 (BERT); Joshi et al. 2020 (SpanBERT).
"""

from __future__ import annotations

import json

import numpy as np
from transformers import PreTrainedTokenizerBase

from ptft_dist.config.token_ids import id_count
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.common.masking_settings import Masking
from ptft_dist.tasks.protocol import IGNORE, TaskSetup

SPAN_LENGTH, LONGEST_SPAN = 5.0, 10  # SpanBERT's p = 0.2 and its clip


class Masker:
    """Masks rows as a pure function of the row and a random generator."""

    def __init__(self, setup: TaskSetup) -> None:
        """Raises RecipeError if the tokenizer has no mask token, or if the beginnings of words are unknown."""
        tokenizer = setup.tokenizer
        if tokenizer.mask_token_id is None:
            raise RecipeError(f"tokenizer: it has no mask token, and task {setup.name} needs one (mask_token)")
        self.settings: Masking = setup.settings
        self.mask_id = int(tokenizer.mask_token_id)
        self.ids = np.array(sorted(set(tokenizer.get_vocab().values())))
        self.special = np.zeros(id_count(tokenizer), bool)
        self.special[tokenizer.all_special_ids] = True
        self.begins_word = word_beginnings(tokenizer, setup.name) if self.settings.unit == "word" else None

    def mask(self, ids: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The network's input and the targets (-100: none): both int64 [T].

        Each chosen token is masked, replaced or kept independently; the tokens of a span together, as in the papers.
        """
        settings = self.settings
        chosen = choose(ids, self.special[ids], self.begins_word, settings, random)
        fate = random.random(len(ids))
        if settings.unit == "span" and len(ids):
            begins = chosen & ~np.concatenate(([False], chosen[:-1]))
            fate = fate[np.maximum.accumulate(np.where(begins, np.arange(len(ids)), 0))]
        seen = ids.copy()
        seen[chosen & (fate < settings.mask_share)] = self.mask_id
        replaced = chosen & (fate >= settings.mask_share) & (fate < settings.mask_share + settings.random_share)
        seen[replaced] = self.ids[random.integers(len(self.ids), size=len(ids))[replaced]]
        return seen, np.where(chosen, ids, IGNORE)


def choose(
    ids: np.ndarray,
    special: np.ndarray,
    begins_word: np.ndarray | None,
    settings: Masking,
    random: np.random.Generator,
) -> np.ndarray:
    """Mask of the tokens to predict: bool [T]; never special tokens."""
    if settings.unit == "span":
        return _choose_spans(special, settings, random)
    if begins_word is None:
        return (random.random(len(ids)) < settings.probability) & ~special
    words = np.cumsum(begins_word[ids] | special)  # a special token ends the word before it
    return (random.random(len(ids) + 1) < settings.probability)[words] & ~special


def _choose_spans(special: np.ndarray, settings: Masking, random: np.random.Generator) -> np.ndarray:
    """Draw spans of geometric length until the fraction is reached; no span contains a special token.

    A part of a token is rounded up with its own probability, so that rows of few tokens are predicted as often.
    """
    chosen = np.zeros(len(special), bool)
    budget = int(settings.probability * int((~special).sum()) + random.random())
    mean = settings.span_length or SPAN_LENGTH
    tries = 0
    while chosen.sum() < budget and tries < 20 * len(special):
        tries += 1
        length = min(int(random.geometric(1 / mean)), LONGEST_SPAN, budget - int(chosen.sum()))
        start = int(random.integers(len(special)))
        span = slice(start, start + length)
        if start + length <= len(special) and not special[span].any() and not chosen[span].any():
            chosen[span] = True
    return chosen


def word_beginnings(tokenizer: PreTrainedTokenizerBase, section: str) -> np.ndarray:
    """For each token id, whether a word begins with it: bool [V]. Raises RecipeError for an unknown tokenizer type."""
    kind, tokens = None, [""] * id_count(tokenizer)
    for token, i in tokenizer.get_vocab().items():
        tokens[i] = token
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        kind = (state["model"]["type"], "ByteLevel" in json.dumps(state["pre_tokenizer"]))
    if kind is not None and kind[0] == "WordPiece":
        return np.array([not token.startswith("##") for token in tokens])
    if kind == ("BPE", True):  # bytes: a space is spelt U+0120, a line feed U+010A, a tab U+0109
        return np.array([token.startswith(("\u0120", "\u010a", "\u0109")) for token in tokens])
    if kind is not None and kind[0] == "Unigram":
        return np.array([token.startswith("\u2581") for token in tokens])
    raise RecipeError(
        f"{section}.unit: the beginnings of words are not known for this tokenizer; use unit: token or span"
    )
