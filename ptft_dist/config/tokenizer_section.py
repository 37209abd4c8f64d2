"""The tokenizer section of a recipe: which tokenizer, how one is trained, and the tokens that are added."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.section import (
    Positive,
    Section,
    Text,
    TokenizerName,
    exactly_one,
    only_with,
)


class TokenizerTraining(Section):
    """A tokenizer trained on the training documents by `ptft prepare` or `ptft train`."""

    algorithm: Literal["bpe", "wordpiece", "unigram"] = "bpe"
    """`bpe`: byte-level byte-pair encoding, which can encode every text. `wordpiece`: as in BERT, with its
    normalization, cased. `unigram`: as in SentencePiece. Text that the last two cannot encode becomes unknown tokens,
    which are counted."""
    vocab_size: Annotated[int, Field(ge=257, le=2_000_000)] = 8192
    """Number of tokens, including special tokens and, for `bpe`, the 256 bytes."""
    min_frequency: PositiveInt = 2
    """`bpe`, `wordpiece`: a pair of tokens that occurs less often than this is not merged."""
    max_megabytes: Positive | None = None
    """Train on about this many MB from the beginning of the training text. Default: all of it."""
    normalizer: Literal["none", "nfc", "nfkc", "bert"] | None = None
    """Unicode normalization before a text is split into words. Default: `none` for bpe, `bert` (that of BERT) for
    wordpiece, which takes no other, and `nfkc` for unigram."""
    lowercase: bool = False
    """Convert texts to lower case."""
    strip_accents: bool = False
    """Remove accents."""
    pre_tokenizer: Literal["gpt2", "llama3", "words", "spaces"] | None = None
    """How texts are split into words; no token contains parts of two words. `gpt2` (default of bpe), `llama3` (bpe):
    the patterns of these models; that of Llama 3, like GPT-4's, has groups of at most three digits. `spaces` (default
    of unigram): at spaces. `words` (wordpiece, unigram): at spaces and around each punctuation character."""
    split_digits: bool = False
    """Each digit is a word of its own."""
    split_cjk: bool = False
    """Each Chinese character is a word of its own; `bert` does this anyway."""
    byte_fallback: bool = False
    """`unigram`: encode unknown characters as bytes, which takes 256 tokens."""
    special_tokens: tuple[Text, ...] = ()
    """Special tokens besides those of the task, such as ["<|im_start|>", "<|im_end|>"] for a chat model to come."""

    @property
    def normalizer_used(self) -> str:
        return self.normalizer or {"bpe": "none", "wordpiece": "bert", "unigram": "nfkc"}[self.algorithm]

    @property
    def pre_tokenizer_used(self) -> str:
        return self.pre_tokenizer or _PRE_TOKENIZERS[self.algorithm][0]

    @model_validator(mode="after")
    def _check(self) -> TokenizerTraining:
        fitting = _PRE_TOKENIZERS[self.algorithm]
        if self.pre_tokenizer_used not in fitting:
            text = f"pre_tokenizer: {self.pre_tokenizer} does not fit algorithm: {self.algorithm}"
            raise ValueError(f"{text}. Use {' or '.join(fitting)}")
        if (self.normalizer_used == "bert") != (self.algorithm == "wordpiece"):
            fitting = ("bert",) if self.algorithm == "wordpiece" else ("none", "nfc", "nfkc")
            text = f"normalizer: {self.normalizer} does not fit algorithm: {self.algorithm}"
            raise ValueError(f"{text}. Use {' or '.join(fitting)}")
        only_with(self, ("min_frequency",), self.algorithm != "unigram", "algorithm: bpe or wordpiece")
        only_with(self, ("byte_fallback",), self.algorithm == "unigram", "algorithm: unigram")
        only_with(self, ("split_cjk",), self.algorithm != "wordpiece", "algorithm: bpe or unigram; wordpiece does it")
        return self


_PRE_TOKENIZERS = {"bpe": ("gpt2", "llama3"), "wordpiece": ("words",), "unigram": ("spaces", "words")}
"""The pre-tokenizers that fit an algorithm; the first is its default."""


class TokenizerExtension(Section):
    """New tokens that are learned from the training documents and added to the tokenizer of tokenizer.path."""

    tokens: PositiveInt
    """How many tokens to add: those that shorten the training texts most."""
    min_frequency: PositiveInt = 2
    """Words that occur less often than this are ignored."""
    max_megabytes: Positive | None = None
    """Learn from about this many MB from the beginning of the training text. Default: all of it."""


class TokenizerSection(Section):
    """The tokenizer. Without this section, the tokenizer of model.path is used."""

    path: TokenizerName | None = None
    """A local directory or a Hub name."""
    revision: Text | None = None
    """The commit, branch or tag of a Hub tokenizer."""
    train: TokenizerTraining | None = None
    """Train a tokenizer on the training documents."""
    add: tuple[Text, ...] = ()
    """Words to add as tokens. The network's embeddings are enlarged."""
    extend: TokenizerExtension | None = None
    """Learn new tokens from the training documents, and add them."""
    init_added: Literal["pieces", "mean", "random"] | None = None
    """How the embeddings of added tokens start: as the mean of those of the pieces into which the tokenizer split them
    before (default with model.path), as the mean of all tokens, or at random."""
    trust_remote_code: bool = False
    """Run Python code from the tokenizer's repository. Read that code before you set this."""

    @model_validator(mode="after")
    def _check(self) -> TokenizerSection:
        exactly_one(self, "path", "train")
        only_with(self, ("revision", "trust_remote_code", "extend"), self.path is not None, "tokenizer.path")
        if twice := [word for word, count in Counter(self.add).items() if count > 1]:
            raise ValueError(f"add: {twice[0]!r} is listed twice. Remove one")
        return self
