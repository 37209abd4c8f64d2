"""Learns the vocabulary of a tokenizer from texts: the same bytes on every machine, whatever the number of threads.

The BPE trainer of `tokenizers` breaks ties in a fixed order. Its WordPiece and Unigram trainers iterate over hash maps
with random seeds: WordPiece numbers the letters inside words in that order and breaks ties by number; Unigram adds
floats in it. So both learn from a sorted table of counted words here: WordPiece after all letters are numbered, and
Unigram with sentencepiece, which adds in the order of its input.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.errors import RecipeError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LEARNING_VERSION = 2
"""Part of the fingerprint of wordpiece and unigram tokenizers. Increase it when the same texts give another one."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
"""The words of Llama 3, much like those of GPT-4."""

_THREADS = 4  # of sentencepiece, on any machine: sums of floats depend on it
_REPEATED_AT_ONCE = 10_000
_NEVER = -1000.0  # the score of pieces that no text may be split into: special tokens and bytes
_LONGEST_PART = 64  # characters; longer words without white space underflow in sentencepiece's sums of probabilities
_PART = re.compile(rf"\s|\S{{1,{_LONGEST_PART}}}")
_HIDDEN = {code: 0xF0000 + code for code in (0x0, 0x9, 0xA, 0xD, 0x2585)}  # have a meaning in sentencepiece's input
_SHOWN = {private: code for code, private in _HIDDEN.items()}


def learn(
    settings: TokenizerTraining, texts: Iterable[str], special: Mapping[str, str], extra: Sequence[str]
) -> Tokenizer:
    """The tokenizer of the texts, without a post-processor.

    Args:
        special: role -> special token; with `unk` unless the algorithm is bpe.
        extra: special tokens without a role.

    Raises:
        RecipeError: the vocabulary is too small for its bytes and special tokens, or a special token is given twice.
    """
    tokens = [*special.values(), *extra]
    if double := [token for token, count in Counter(tokens).items() if count > 1]:
        raise RecipeError(f"tokenizer.train.special_tokens: {double[0]!r} is a special token already. Remove it.")
    bytes_needed = 256 if settings.algorithm == "bpe" or settings.byte_fallback else 0
    if settings.vocab_size < (least := bytes_needed + len(tokens)):
        parts = "the 256 bytes and " if bytes_needed else ""
        parts += f"the special tokens ({', '.join(tokens[:10])})"
        raise RecipeError(
            f"tokenizer.train.vocab_size: {settings.vocab_size} is too small: {parts} need {least}. Set at least that."
        )
    learner = {"bpe": _learn_bpe, "wordpiece": _learn_wordpiece, "unigram": _learn_unigram}[settings.algorithm]
    backend = learner(settings, texts, special, tokens)
    backend.add_special_tokens(tokens)
    return backend


def _learn_bpe(settings: TokenizerTraining, texts: Iterable[str], special: Mapping[str, str], tokens: list[str]) -> Any:  # noqa: ARG001
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = _with_words(Tokenizer(models.BPE()), settings)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        special_tokens=tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _learn_wordpiece(
    settings: TokenizerTraining, texts: Iterable[str], special: Mapping[str, str], tokens: list[str]
) -> Any:
    """BPE on letters; one inside a word begins with ##. Words with a letter that is not kept are left out.

    If the words do not fill the vocabulary, as where each Chinese character is a word, more letters are kept.
    """
    words, most = count_words(settings, texts), _most_letters(settings)
    while True:
        letters, inner = _letters(settings, words, settings.vocab_size - len(tokens), most)
        numbered = [*tokens, *sorted(letters), *sorted(f"##{letter}" for letter in inner)]
        vocabulary = _wordpieces(settings, words, letters, numbered)
        left = settings.vocab_size - len(vocabulary)
        if left <= 0 or len(letters) < most:
            break
        most += left
    from tokenizers import Tokenizer, decoders, models

    backend = Tokenizer(models.WordPiece(vocabulary, unk_token=special["unk"]))
    backend.decoder = decoders.WordPiece()
    return _with_words(backend, settings)


def _wordpieces(
    settings: TokenizerTraining, words: Mapping[str, int], letters: set[str], numbered: list[str]
) -> dict[str, int]:
    """Token -> id: those of `numbered`, and what is learned from the words of these letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.WordPiece(unk_token=numbered[0]))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(
        vocab_size=settings.vocab_size,
        min_frequency=settings.min_frequency,
        special_tokens=numbered,  # the first ids, in this order
        limit_alphabet=0,  # no letter but these
        show_progress=False,
    )
    learner.train_from_iterator(_repeated(word for word in words.items() if letters.issuperset(word[0])), trainer)
    vocabulary: dict[str, int] = learner.get_vocab()
    return vocabulary


def _learn_unigram(
    settings: TokenizerTraining, texts: Iterable[str], special: Mapping[str, str], tokens: list[str]
) -> Any:
    """The pieces and scores of sentencepiece. Words with a letter that is not kept are left out."""
    from tokenizers import Tokenizer, decoders, models

    words: Counter[str] = Counter()
    for word, count in count_words(settings, texts).items():
        for part in _PART.findall(word):
            words[part] += count
    raw_bytes = [f"<0x{byte:02X}>" for byte in range(256)] if settings.byte_fallback else []
    free = settings.vocab_size - len(tokens) - len(raw_bytes)
    letters, _ = _letters(settings, words, free, _most_letters(settings))
    kept = {word: count for word, count in sorted(words.items()) if letters.issuperset(word)}
    taken = {*tokens, *raw_bytes}
    pieces = [(piece, score) for piece, score in _sentencepieces(kept, free) if piece not in taken] if kept else []
    vocabulary = [*((token, _NEVER) for token in [*tokens, *raw_bytes]), *pieces]
    unknown_id = tokens.index(special["unk"])
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=unknown_id, byte_fallback=settings.byte_fallback))
    spaces = decoders.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), spaces]) if settings.byte_fallback else spaces
    return _with_words(backend, settings)


def _sentencepieces(words: Mapping[str, int], count: int) -> list[tuple[str, float]]:
    """At most `count` pieces with their log-probabilities, the most probable first. words: word -> count, sorted."""
    import sentencepiece

    model = io.BytesIO()
    with TemporaryDirectory() as folder:
        table = Path(folder) / "words.tsv"
        with table.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{word.translate(_HIDDEN)}\t{number}\n" for word, number in words.items())
        sentencepiece.SentencePieceTrainer.train(
            input=str(table),
            input_format="tsv",
            model_writer=model,
            model_type="unigram",
            vocab_size=count + 1,  # its unknown token too
            hard_vocab_limit=False,
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=_THREADS,
            minloglevel=2,
        )
    learned = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [(learned.id_to_piece(i).translate(_SHOWN), learned.get_score(i)) for i in range(1, learned.vocab_size())]
    return sorted(pieces, key=lambda piece: (-piece[1], piece[0]))


# --- words ------------------------------------------------------------------------------------------------------------


def count_words(settings: TokenizerTraining, texts: Iterable[str]) -> dict[str, int]:
    """The normalized words of the texts and how often each occurs, sorted."""
    from tokenizers import Tokenizer, models

    return count_words_of(_with_words(Tokenizer(models.WordLevel()), settings), texts)


def count_words_of(backend: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """The words into which normalizer and pre-tokenizer of `backend` split the texts, and their counts, sorted."""
    from tokenizers import Tokenizer, models, trainers

    counter = Tokenizer(models.WordLevel())
    if backend.normalizer is not None:
        counter.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        counter.pre_tokenizer = backend.pre_tokenizer
    trainer = trainers.WordLevelTrainer(vocab_size=0, show_progress=False)
    counter.train_from_iterator(texts, trainer)
    words = json.loads(trainer.__getstate__())["WordLevelTrainer"]["words"]
    return dict(sorted(words.items()))


def _most_letters(settings: TokenizerTraining) -> int:
    """With the usual 1,000 letters, most text in a script with thousands of letters would be unknown."""
    return max(1000, settings.vocab_size // 2)


def _letters(settings: TokenizerTraining, words: Mapping[str, int], free: int, most: int) -> tuple[set[str], set[str]]:
    """The most frequent letters of the words, at most `most`, that fit into `free` tokens; and those of them that occur
    inside words."""
    counts: Counter[str] = Counter()
    inner: set[str] = set()
    for word, count in words.items():
        for letter in word:
            counts[letter] += count
        inner.update(word[1:])
    if settings.algorithm != "wordpiece":
        inner = set()
    letters: set[str] = set()
    for letter, _ in sorted(counts.items(), key=lambda each: (-each[1], each[0])):
        free -= 2 if letter in inner else 1
        if free < 0 or len(letters) == most:
            break
        letters.add(letter)
    return letters, inner & letters


def _repeated(words: Iterable[tuple[str, int]]) -> Iterator[str]:
    """Texts in which each word occurs as often as counted."""
    for word, count in words:
        for start in range(0, count, _REPEATED_AT_ONCE):
            yield f"{word} " * min(_REPEATED_AT_ONCE, count - start)


# --- normalizers and pre-tokenizers -----------------------------------------------------------------------------------


def _with_words(backend: Tokenizer, settings: TokenizerTraining) -> Tokenizer:
    """The tokenizer, with normalizer and pre-tokenizer of the settings."""
    if (normalizer := _normalizer(settings)) is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = _pre_tokenizer(settings)
    return backend


def _normalizer(settings: TokenizerTraining) -> Any:
    from tokenizers import normalizers

    if settings.normalizer_used == "bert":
        return normalizers.BertNormalizer(lowercase=settings.lowercase, strip_accents=settings.strip_accents)
    steps: list[Any] = [normalizers.NFD(), normalizers.StripAccents()] if settings.strip_accents else []
    if settings.normalizer_used == "nfkc":
        steps.append(normalizers.NFKC())
    elif settings.normalizer_used == "nfc" or steps:
        steps.append(normalizers.NFC())
    if settings.lowercase:
        steps.append(normalizers.Lowercase())
    return None if not steps else steps[0] if len(steps) == 1 else normalizers.Sequence(steps)


def _pre_tokenizer(settings: TokenizerTraining) -> Any:
    from tokenizers import Regex, pre_tokenizers

    splits: list[Any] = []
    if settings.split_digits:
        splits.append(pre_tokenizers.Digits(individual_digits=True))
    if settings.split_cjk:
        splits.append(pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"))
    chosen = settings.pre_tokenizer_used
    if settings.algorithm == "wordpiece":
        steps = [*splits, pre_tokenizers.BertPreTokenizer()]
    elif settings.algorithm == "unigram":  # spaces first: a piece after a split begins without one
        words = [pre_tokenizers.Punctuation()] if chosen == "words" else []
        steps = [pre_tokenizers.Metaspace(), *words, *splits]
    else:
        pattern = [pre_tokenizers.Split(Regex(LLAMA3), "isolated")] if chosen == "llama3" else []
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=chosen == "gpt2")
        steps = [*splits, *pattern, bytes_]
    return steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
