"""Trains and loads tokenizers, and encodes documents: special tokens in a text are encoded as plain text."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ptft_dist.config.token_ids import id_count
from ptft_dist.config.tokenizer_section import TokenizerTraining
from ptft_dist.data.cache import fingerprint
from ptft_dist.data.fast_bpe import TextTokens
from ptft_dist.data.formats import Document
from ptft_dist.errors import DataError, RecipeError

LONGEST_WORD = 2000
"""Longest word, in characters, of the texts that a tokenizer is trained on. A word is a run of characters that are not
white space, or a run of white space."""

_GIANT = re.compile(rf"\S{{{LONGEST_WORD + 1},}}|\s{{{LONGEST_WORD + 1},}}")
_PIECE = re.compile(rf"(?s:.{{1,{LONGEST_WORD}}})")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def special_tokens(algorithm: str, roles: Sequence[str]) -> dict[str, str]:
    """The special token of each role (eos, bos, pad, cls, sep, mask, unk) in a tokenizer that is trained here.

    A role may name its own token: `eos=<|im_end|>`.
    """
    tokens = {}
    for role, _, own in (role.partition("=") for role in roles):
        if own or algorithm == "wordpiece":
            tokens[role] = own or f"[{role.upper()}]"
        else:
            tokens[role] = "<|endoftext|>" if role == "eos" else f"<|{role}|>"
    return tokens


def train_tokenizer(
    settings: TokenizerTraining,
    texts: Iterable[str],
    roles: Sequence[str] = ("eos", "bos", "pad"),
    extra: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Train a tokenizer. The same texts give the same bytes.

    A warning says if the texts have too little repetition for settings.vocab_size; the tokenizer is then smaller.

    Args:
        roles: roles of special tokens, see `special_tokens`.
        extra: special tokens without a role, besides settings.special_tokens.

    Raises:
        RecipeError: see `learn`.
    """
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    from ptft_dist.data.tokenizer_learning import learn

    extra = (*extra, *settings.special_tokens)
    unknown = () if settings.algorithm == "bpe" or "unk" in roles else ("unk",)
    special = special_tokens(settings.algorithm, (*roles, *unknown))
    backend = learn(settings, first_megabytes(texts, settings.max_megabytes), special, extra)
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
            "tokenizer.train.vocab_size: %d tokens were requested, but the training texts give only %d: %s",
            settings.vocab_size,
            len(tokenizer),
            "nothing else is repeated often enough"
            if settings.algorithm == "unigram"
            else f"no other pair of tokens occurs at least {settings.min_frequency} times",
        )
    return tokenizer


def learnable(texts: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The texts in pieces without words longer than LONGEST_WORD characters; usually one piece each.

    Training time grows with the square of the longest word: 20 minutes for a million equal characters. One warning
    counts the texts with such a word.

    Args:
        texts: each with its place ("file:line").
    """
    first, count = "", 0
    try:
        for text, where in texts:
            cuts = [match.start() for run in _GIANT.finditer(text) for match in _PIECE.finditer(text, *run.span())]
            if cuts:
                first, count = first or where, count + 1
            for start, stop in pairwise([0, *(cut for cut in cuts if cut), len(text)]):
                yield text[start:stop]
    finally:  # also if the first megabytes are enough
        if count:
            logging.getLogger("ptft").warning(
                "%s%s: the text has a word, or white space, of more than %d characters; it is split for the training "
                "of the tokenizer. Check that it is text; that of a script without spaces, such as Chinese, may be so.",
                first,
                f" and {count - 1:,} more texts" if count > 1 else "",
                LONGEST_WORD,
            )


def first_megabytes(texts: Iterable[str], megabytes: float | None) -> Iterator[str]:
    """Whole texts, until their UTF-8 size reaches the limit."""
    size = 0
    for text in texts:
        yield text
        if megabytes is not None and (size := size + len(text.encode())) >= megabytes * 1e6:
            return


def load_tokenizer(
    path: str | Path,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    key: str = "tokenizer.path",
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local directory or the Hub.

    key: the recipe's key that names it, for messages.

    Raises:
        RecipeError: there is no tokenizer, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    if Path(path).is_file():
        raise RecipeError(f"{key}: {path} is a file. Give the directory that contains tokenizer.json.")
    try:
        return AutoTokenizer.from_pretrained(str(path), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises a dozen unrelated types if there is no tokenizer
        raise RecipeError(
            f"{key}: cannot load a tokenizer from {path}: {error}\nGive a directory with tokenizer.json "
            "and tokenizer_config.json, or a Hub name that this machine can reach or has in its cache (HF_HOME)."
        ) from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that affects the token ids of a text or a chat."""
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
    """The Rust tokenizer as JSON, without truncation and padding, which any call may change."""
    if not tokenizer.is_fast:
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in state.items() if key not in ("truncation", "padding")}


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids of the special tokens that the tokenizer itself adds before and after a text."""
    text, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    return [], []


def after_answer(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the chat template writes after an assistant's text: usually an end of turn, and perhaps a newline.

    Empty without a chat template, and for one that refuses a user's and an assistant's message.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return []
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        _, found, rest = str(tokenizer.apply_chat_template(messages, tokenize=False)).rpartition("ANSWER")
    except TemplateError:
        return []
    ids: list[int] = tokenizer(rest, add_special_tokens=False)["input_ids"] if found else []
    return ids


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with BOS, as those of Llama, Gemma and Mistral do."""
    before, _ = added_around(tokenizer)
    return tokenizer.bos_token_id is not None and before[:1] == [tokenizer.bos_token_id]


def marks_languages(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer marks each text with its language, as those of NLLB and mBART do."""
    return any(hasattr(tokenizer, name) for name in ("src_lang", "tgt_lang", "lang_code_to_id"))


class DocumentEncoder:
    """Encodes documents between two special tokens. A special token in a text is encoded as plain text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, boundaries: tuple[str | None, str]) -> None:
        """boundaries: roles of the special tokens at the beginning (None: there is none) and end of a document.

        Raises:
            RecipeError: the tokenizer has no such token.
        """
        begin, end = boundaries
        self.vocab_size = id_count(tokenizer)
        self._prefix = [] if begin is None else [_special_id(tokenizer, begin)]
        self._end = _special_id(tokenizer, end)
        # Within a text, one of these would look like the boundary between two documents.
        self._control = {self._end, *self._prefix}
        self.unknown_id = tokenizer.unk_token_id if tokenizer.unk_token_id not in self._control else None
        self._tokenizer = tokenizer
        self._before, self._after = np.array(self._prefix, np.uint32), np.array([self._end], np.uint32)
        self._tokens = TextTokens(text_only_backend(tokenizer), offsets=False) if tokenizer.is_fast else None

    def disagreement(self) -> str | None:
        """A warning if the special tokens around documents differ from those that the tokenizer itself adds, else None.

        Users of the network encode texts with its tokenizer. If the tokenizer adds nothing after a text, there is no
        warning about EOS, because the network generates it.
        """
        before, after = added_around(self._tokenizer)
        if before == self._prefix and after in ([], [self._end]):
            return None

        def shown(before: list[int], after: list[int]) -> str:
            names = self._tokenizer.convert_ids_to_tokens
            return " ".join([*names(before), "text", *names(after)])

        return (
            f"documents are encoded as `{shown(self._prefix, [self._end])}`, but the tokenizer itself encodes a text "
            f"as `{shown(before, after)}`; users of the trained model will get the latter"
        )

    def encode(self, documents: Sequence[Document]) -> list[np.ndarray]:
        """The token ids of each document, [T]; empty if the tokenizer returns no token for its text.

        Raises:
            DataError: a text contains a special token, and this tokenizer cannot encode it as plain text.
            PtftError: see `TextTokens.of`.
        """
        encoded = []
        for document, ids in zip(documents, self._text_ids([d.text for d in documents]), strict=True):
            for token in self._control:
                if (ids == token).any():
                    raise DataError(
                        f"{document.where}: the text contains {self._tokenizer.convert_ids_to_tokens(token)!r}, "
                        "and this tokenizer encodes it as the special token. Remove it from the text."
                    )
            encoded.append(np.concatenate((self._before, ids, self._after)) if len(ids) else ids)
        return encoded

    def _text_ids(self, texts: list[str]) -> list[np.ndarray]:
        if self._tokens is not None:
            return [tokens.ids for tokens in self._tokens.of(texts)]
        ids = text_ids(self._tokenizer)
        return [np.array(ids(text), np.uint32) for text in texts]


def text_ids(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], list[int]]:
    """Encodes a text without the special tokens around it; a special token in the text is encoded as plain text."""
    if not tokenizer.is_fast:
        return partial(tokenizer.encode, add_special_tokens=False, split_special_tokens=True)
    backend = text_only_backend(tokenizer)
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def text_only_backend(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy of the Rust tokenizer that encodes special tokens in a text as plain text, without truncation and padding.

    It encodes batches on all cores and, unlike `tokenizer(texts)`, creates no attention masks.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend


def check_can_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RecipeError if the tokenizer has no token for padding."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise RecipeError(
            f"tokenizer: {tokenizer.name_or_path} has neither a PAD nor an EOS token for padding. Name one as "
            "pad_token in its tokenizer_config.json, or use another tokenizer."
        )


def _special_id(tokenizer: PreTrainedTokenizerBase, role: str) -> int:
    """Raises RecipeError if the tokenizer has no token for this role."""
    token_id: int | None = getattr(tokenizer, f"{role}_token_id")
    if token_id is None:
        need = {"eos": "each document ends with it", "bos": "the task's setting bos: true needs it"}
        raise RecipeError(
            f"tokenizer: {tokenizer.name_or_path} has no {role.upper()} token, and "
            f"{need.get(role, 'this task needs it')}. Name one as {role}_token in its tokenizer_config.json, or use "
            "another tokenizer."
        )
    return token_id
