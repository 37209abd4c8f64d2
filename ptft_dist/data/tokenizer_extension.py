"""Extends a tokenizer with tokens that are learned from texts, within its own algorithm.

- BPE: learning goes on where it stopped. The texts are split by the tokenizer, and the pair of tokens that occurs most
  often becomes a token, again and again. Texts are encoded as before, and then the new merges apply.
- WordPiece, Unigram: the whole words that save most tokens: occurrences times (pieces - 1).

Equal counts are decided by token ids (BPE) or by the text of the word, so the same texts give the same tokens. Ids of
old tokens stay as they are.
"""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ptft_dist.config.tokenizer_section import TokenizerExtension
from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.data.tokenizer_learning import count_words_of
from ptft_dist.errors import DataError, RecipeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

EXTENSION_VERSION = 2
"""Part of the fingerprint. Increase it when the same texts give other tokens."""

_KEY = "tokenizer.extend"
_FOR_EACH_CUT = 1e-3
"""The log-probability of a new Unigram word is the sum of those of its pieces, plus this for each border between two
pieces. So the whole word is also more probable than a shorter new word followed by the rest."""
_NEVER = -1000.0  # the score of special tokens in a Unigram vocabulary

Words = list[tuple[list[int], int]]
"""The token ids and the count of each word."""


def extend(
    tokenizer: PreTrainedTokenizerBase, settings: TokenizerExtension, texts: Iterable[str]
) -> PreTrainedTokenizerBase:
    """The tokenizer with at most settings.tokens more tokens.

    Raises:
        RecipeError: tokens cannot be added to such a tokenizer.
        DataError: the texts have nothing to learn.
    """
    if not tokenizer.is_fast:
        raise RecipeError(f"{_KEY}: {tokenizer.name_or_path} has no tokenizer.json. Use tokenizer.add")
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] not in ("BPE", "WordPiece", "Unigram") or model.get("continuing_subword_prefix") not in (
        (None, "") if model["type"] == "BPE" else (None, "", "##")
    ):
        raise RecipeError(f"{_KEY}: a {model['type']} tokenizer of this kind cannot be extended. Use tokenizer.add")
    if not _splits_words(backend):
        raise RecipeError(
            f"{_KEY}: {tokenizer.name_or_path} does not split texts into words, so that tokens would contain several. "
            "Use tokenizer.add"
        )
    unknown_id = tokenizer.unk_token_id
    counted = count_words_of(backend, texts)
    split = {w: [t.id for t in backend.model.tokenize(w)] for w, n in counted.items() if n >= settings.min_frequency}
    usable = {word: ids for word, ids in split.items() if len(ids) > 1 and unknown_id not in ids}
    known = tokenizer.get_vocab()
    first_id = max(known.values()) + 1
    if model["type"] == "BPE":
        names = {i: token for token, i in known.items()}
        words = [(ids, counted[word]) for word, ids in usable.items()]
        merges = learn_merges(words, names, settings.tokens, settings.min_frequency, first_id)
        new = [names[a] + names[b] for a, b in merges]
        pairs = [[names[a], names[b]] for a, b in merges]
        model["merges"] += pairs
    else:
        saved = {word: counted[word] * (len(ids) - 1) for word, ids in usable.items() if word not in known}
        new = sorted(saved, key=lambda word: (-saved[word], word))[: settings.tokens]
    if not new:
        least = settings.min_frequency
        raise DataError(f"{_KEY}: the training texts have no word that is split and occurs {least} times. Remove it")
    _add(model, state["added_tokens"], new, {word: usable.get(word, []) for word in new})
    return _reloaded(tokenizer, state, {token: first_id + i for i, token in enumerate(new)})


def _splits_words(backend: Tokenizer) -> bool:
    """Whether two words of a text are split. Llama 2 has no pre-tokenizer, or one that does not split; that of Gemma
    splits at spaces, but its normalizer replaces them before."""
    text = "a b" if backend.normalizer is None else backend.normalizer.normalize_str("a b")
    return backend.pre_tokenizer is not None and len(backend.pre_tokenizer.pre_tokenize_str(text)) > 1


def learn_merges(
    words: Words, names: dict[int, str], most: int, min_frequency: int, first_id: int
) -> list[tuple[int, int]]:
    """The pairs of token ids that byte-pair encoding merges next; the i-th becomes the token first_id + i.

    Of pairs that occur equally often, the one with the smaller ids comes first. A pair whose text is a token already is
    not merged.

    Args:
        words: changed: the new tokens replace their pairs.
        names: id -> text of all tokens; the new ones are added.
    """
    counts: dict[tuple[int, int], int] = defaultdict(int)
    places: dict[tuple[int, int], set[int]] = defaultdict(set)  # words that have, or had, the pair
    for place, (ids, count) in enumerate(words):
        for pair in pairwise(ids):
            counts[pair] += count
            places[pair].add(place)
    taken = set(names.values())
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    merges: list[tuple[int, int]] = []
    while queue and len(merges) < most:
        count, pair = heapq.heappop(queue)
        text = names[pair[0]] + names[pair[1]]
        if -count != counts[pair] or text in taken:  # counted before another merge
            continue
        if -count < min_frequency:
            break
        new_id = first_id + len(merges)
        merges.append(pair)
        names[new_id] = text
        taken.add(text)
        changed: dict[tuple[int, int], int] = defaultdict(int)
        for place in places.pop(pair):
            ids, number = words[place]
            merged = _merged(ids, pair, new_id)
            words[place] = merged, number
            for old in pairwise(ids):
                changed[old] -= number
            for each in pairwise(merged):
                changed[each] += number
                if new_id in each:
                    places[each].add(place)
        for each, difference in changed.items():
            if difference:
                counts[each] += difference
                heapq.heappush(queue, (-counts[each], each))
    return merges


def _merged(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """The ids with the pair replaced, from left to right."""
    merged, position = [], 0
    while position < len(ids):
        if tuple(ids[position : position + 2]) == pair:
            merged.append(new_id)
            position += 2
        else:
            merged.append(ids[position])
            position += 1
    return merged


def _add(model: dict[str, Any], added: list[dict[str, Any]], new: list[str], pieces: Mapping[str, list[int]]) -> None:
    """Add tokens to the JSON of a model, after all others.

    Special tokens may follow the model's own tokens, and the library numbers them after these. So the model gets them
    too, with the ids that they have.
    """
    vocabulary, outside = model["vocab"], {token["content"]: token["id"] for token in added}
    if isinstance(vocabulary, dict):
        vocabulary |= outside
        first_id = max(vocabulary.values()) + 1
        vocabulary |= {token: first_id + i for i, token in enumerate(new)}
        return
    scores = [score for _, score in vocabulary]
    ordered = sorted(outside.items(), key=lambda each: each[1])
    vocabulary += [[token, _NEVER] for token, token_id in ordered if token_id >= len(scores)]
    vocabulary += [
        [token, sum(scores[i] for i in pieces[token]) + _FOR_EACH_CUT * (len(pieces[token]) - 1)] for token in new
    ]


def _reloaded(
    tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], new: Mapping[str, int]
) -> PreTrainedTokenizerBase:
    """The tokenizer with another backend. Raises RecipeError if not all tokens have the ids that they must have."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        extended = load_tokenizer(folder)
    extended.name_or_path = tokenizer.name_or_path
    if extended.get_vocab() != tokenizer.get_vocab() | dict(new):
        raise RecipeError(f"{_KEY}: the ids of this tokenizer cannot be kept. Use tokenizer.add")
    return extended
