"""How text becomes token ids: learning a tokenizer, loading one, and encoding documents as text and nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ptft_dist.config.recipe import TokenizerTraining
from ptft_dist.data.cache import fingerprint
from ptft_dist.data.formats import Document
from ptft_dist.errors import DataError, RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def special_tokens(algorithm: str, roles: Sequence[str]) -> dict[str, str]:
    """How each role (eos, bos, pad, cls, sep, mask, unk) is spelt in a tokenizer that is learned here.

    A role may bring its own spelling: `eos=<|im_end|>`.
    """
    spelt = {}
    for role, _, own in (role.partition("=") for role in roles):
        if own or algorithm == "wordpiece":
            spelt[role] = own or f"[{role.upper()}]"
        else:
            spelt[role] = "<|endoftext|>" if role == "eos" else f"<|{role}|>"
    return spelt


def train_tokenizer(
    settings: TokenizerTraining,
    texts: Iterable[str],
    roles: Sequence[str] = ("eos", "bos", "pad"),
    extra: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Learn a tokenizer with special tokens for `roles`, and the `extra` ones, which have no role. The same texts give
    the same tokenizer by `bpe`, byte for byte; by `wordpiece` and `unigram` one as good, for the library goes through
    its words in a random order.

    If the texts do not hold enough repetition for settings.vocab_size, the tokenizer is smaller, and a warning says so.

    Raises:
        RecipeError: the vocabulary is too small for the bytes and the special tokens.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    unknown = () if settings.algorithm == "bpe" or "unk" in roles else ("unk",)
    special = special_tokens(settings.algorithm, (*roles, *unknown))
    backend, trainer = _untrained(settings, special, extra)
    backend.train_from_iterator(_first_megabytes(texts, settings.max_megabytes), trainer)
    if "cls" in special:
        cls, sep = special["cls"], special["sep"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} $B:1 {sep}:1",
            special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
        )
    names: dict[str, Any] = {f"{role}_token": token for role, token in special.items()}
    if extra:
        names["extra_special_tokens"] = list(extra)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    if len(tokenizer) < settings.vocab_size:
        logging.getLogger("ptft").warning(
            "tokenizer.train.vocab_size: %d tokens were asked for, but the training text gives only %d: no further "
            "pair of tokens stands in it %d times or more",
            settings.vocab_size,
            len(tokenizer),
            settings.min_frequency,
        )
    return tokenizer


def _untrained(settings: TokenizerTraining, special: dict[str, str], extra: Sequence[str]) -> tuple[Any, Any]:
    """A tokenizer of the right kind that knows nothing yet, and its trainer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    common: dict[str, Any] = {
        "vocab_size": settings.vocab_size,
        "special_tokens": [*special.values(), *extra],
        "show_progress": False,
    }
    if settings.algorithm == "bpe":
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        least = len(alphabet) + len(special) + len(extra)
        if settings.vocab_size < least:
            raise RecipeError(
                f"tokenizer.train.vocab_size: {settings.vocab_size} is too small; the 256 bytes and the special tokens "
                f"{', '.join([*special.values(), *extra][:10])} alone need {least}."
            )
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return backend, trainers.BpeTrainer(
            min_frequency=settings.min_frequency, initial_alphabet=sorted(alphabet), **common
        )
    if settings.algorithm == "wordpiece":
        backend = Tokenizer(models.WordPiece(unk_token=special["unk"]))
        backend.normalizer = normalizers.BertNormalizer(lowercase=False)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        # Of a script with thousands of characters the usual thousand would make most text unknown.
        letters = max(1000, settings.vocab_size // 2)
        return backend, trainers.WordPieceTrainer(
            min_frequency=settings.min_frequency, limit_alphabet=letters, **common
        )
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend, trainers.UnigramTrainer(unk_token=special["unk"], **common)


def _first_megabytes(texts: Iterable[str], megabytes: float | None) -> Iterator[str]:
    """Whole texts until they reach that size in UTF-8."""
    size = 0
    for text in texts:
        yield text
        if megabytes is not None and (size := size + len(text.encode())) >= megabytes * 1e6:
            return


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory or of the Hub.

    Raises:
        RecipeError: there is no tokenizer, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if Path(path).is_file():
        raise RecipeError(f"tokenizer.path: {path} is a file. Give the directory that holds tokenizer.json.")
    try:
        return AutoTokenizer.from_pretrained(str(path), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a dozen unrelated types, and all mean that there is no tokenizer to go on with
        raise RecipeError(
            f"tokenizer.path: no tokenizer can be loaded from {path}. {error}\nGive a directory with tokenizer.json "
            "and tokenizer_config.json, or a Hub name that this machine can reach or has in its cache (HF_HOME)."
        ) from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides which ids a text or a chat becomes."""
    return fingerprint(
        {
            "backend": _backend_state(tokenizer),
            "vocabulary": tokenizer.get_vocab(),
            "added": {i: repr(token) for i, token in sorted(tokenizer.added_tokens_decoder.items())},
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "chat_template": tokenizer.chat_template,
        }
    )


def _backend_state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | None:
    """The Rust tokenizer as JSON, less the two settings that every call to it may change."""
    if not tokenizer.is_fast:
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in state.items() if key not in ("truncation", "padding")}


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids of the special tokens that the tokenizer itself puts before and behind a text."""
    text, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    return [], []


class DocumentEncoder:
    """Encodes documents between two special tokens. What a text spells is text, even if it spells a special token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, boundaries: tuple[str | None, str]) -> None:
        """boundaries: the roles of the tokens at a document's beginning (None: there is none) and end.

        Raises:
            RecipeError: the tokenizer has no such token.
        """
        begin, end = boundaries
        self.vocab_size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
        self._prefix = [] if begin is None else [_special_id(tokenizer, begin)]
        self._end = _special_id(tokenizer, end)
        # A text that became one of these would end or begin a document in its middle.
        self._control = {self._end, *self._prefix}
        self.unknown_id = tokenizer.unk_token_id if tokenizer.unk_token_id not in self._control else None
        self._tokenizer = tokenizer
        self._backend = text_only_backend(tokenizer) if tokenizer.is_fast else None

    def encode(self, documents: Sequence[Document]) -> list[list[int]]:
        """The ids of each document; an empty list for one whose text comes to nothing in this tokenizer.

        Raises:
            DataError: a text spells a special token, and this tokenizer cannot write it otherwise.
        """
        encoded = []
        for document, ids in zip(documents, self._text_ids([d.text for d in documents]), strict=True):
            found = self._control.intersection(ids)
            if found:
                raise DataError(
                    f"{document.where}: the text spells {self._tokenizer.convert_ids_to_tokens(found.pop())!r}, and "
                    "this tokenizer can only read that as the special token. Remove it from the text."
                )
            encoded.append([*self._prefix, *ids, self._end] if ids else [])
        return encoded

    def _text_ids(self, texts: list[str]) -> Iterator[list[int]]:
        if self._backend is not None:
            return (e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False))
        encode = self._tokenizer.encode
        return (encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts)


def text_only_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy of the Rust tokenizer that neither cuts, nor pads, nor looks for special tokens in a text.

    Its batches run on all cores, and unlike `tokenizer(texts)` they make no attention masks and offsets.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def check_can_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RecipeError if there is no token to fill rows up with."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise RecipeError(
            f"tokenizer: {tokenizer.name_or_path} has neither a PAD nor an EOS token to fill rows up with. Name one as "
            "pad_token in its tokenizer_config.json, or use another tokenizer."
        )


def _special_id(tokenizer: PreTrainedTokenizerBase, role: str) -> int:
    token_id: int | None = getattr(tokenizer, f"{role}_token_id")
    if token_id is None:
        need = {"eos": "each document ends with it", "bos": "the task's setting bos: true asks for it"}
        raise RecipeError(
            f"tokenizer: {tokenizer.name_or_path} has no {role.upper()} token, and "
            f"{need.get(role, 'this task needs it')}. Name one as {role}_token in its tokenizer_config.json, or use "
            "another tokenizer."
        )
    return token_id
