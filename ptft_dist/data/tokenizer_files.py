"""Directories of tokenizers in the cache, and their fingerprints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ptft_dist.config.places import local_directory
from ptft_dist.data.cache import HashMemo, build_once, fingerprint, writing
from ptft_dist.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from ptft_dist.errors import RecipeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ORIGIN = "ptft_origin.json"
"""A file in directories of `build_changed` with the fingerprint and the hash of the other files, to recognize copies of
the directory, and with the pieces of the added tokens, see `read_pieces`."""

_ORIGIN_VERSION = 3  # part of the directory's name: those of earlier versions have no pieces, or not all of them

Pieces = dict[int, list[int]]
"""Id of an added token -> the ids into which the tokenizer split its text before; empty if it could not. Of a tokenizer
that was changed several times, these may be ids of tokens that were added earlier."""

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


class TokenizerFiles:
    """Finds and builds directories of tokenizers."""

    def __init__(self, cache: Path, memo: HashMemo) -> None:
        """cache: where built tokenizers are kept."""
        self._cache, self._memo = cache, memo

    def load(self, path: str, base: Path, revision: str | None, trust_remote_code: bool) -> tuple[str, Path]:
        """The fingerprint and the directory of a local tokenizer, or of a copy of one from the Hub.

        Raises:
            RecipeError: there is no such tokenizer.
        """
        if (local := local_directory(path, base, "tokenizer.path")) is not None:
            return self._fingerprint(local), local
        tokenizer = load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code)
        return self.build(tokenizer_fingerprint(tokenizer), lambda: tokenizer)

    def has(self, name: str) -> bool:
        """Whether the directory `name` has been built."""
        return (self._cache / name).is_dir()

    def has_changed(self, name: str) -> bool:
        """Whether `build_changed` has built the tokenizer with this fingerprint."""
        return self._changed(name).is_dir()

    def _changed(self, name: str) -> Path:
        return self._cache / fingerprint([name, _ORIGIN_VERSION])

    def build(self, name: str, make: Callable[[], PreTrainedTokenizerBase]) -> tuple[str, Path]:
        """Save the tokenizer of `make()` in the directory `name`, once; return its fingerprint and directory.

        The fingerprint is computed from the files, because a library of another version may give other ids.
        """
        directory = self._cache / name
        build_once(directory, lambda unfinished: _save(make(), unfinished, directory))
        return contents_of(directory), directory

    def build_changed(self, name: str, make: Callable[[], tuple[PreTrainedTokenizerBase, Pieces]]) -> Path:
        """Save the tokenizer of `make()`, whose fingerprint is `name`, and the pieces of its added tokens; return the
        directory."""
        directory = self._changed(name)

        def build(unfinished: Path) -> None:
            tokenizer, pieces = make()
            _save(tokenizer, unfinished, directory)
            origin = {"fingerprint": name, "contents": contents_of(unfinished), "pieces": pieces}
            with writing(directory):
                (unfinished / ORIGIN).write_text(json.dumps(origin) + "\n", encoding="utf-8")

        build_once(directory, build)
        return directory

    def fingerprint_of_copy(self, directory: Path) -> str:
        """The fingerprint of a copy of a directory from `build` or `build_changed`, recognized by its contents."""
        contents = contents_of(directory)
        origin = directory / ORIGIN
        if origin.is_file():
            known = json.loads(origin.read_text(encoding="utf-8"))
            if known["contents"] == contents:
                return str(known["fingerprint"])
        return contents

    def fingerprint_local(self, path: str, base: Path) -> str | None:
        """The fingerprint of a local tokenizer; None for a Hub name.

        Raises:
            RecipeError: there is no such tokenizer.
        """
        local = local_directory(path, base, "tokenizer.path")
        return None if local is None else self._fingerprint(local)

    def _fingerprint(self, directory: Path) -> str:
        """A hash of all files except weights, because loading the tokenizer would take seconds at every start."""
        files = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix not in _WEIGHTS)
        return fingerprint([[file.name for file in files], self._memo.digests(files)])


def read_pieces(directory: Path) -> Pieces:
    """The pieces of the tokens that were added to the tokenizer of a directory; none are known of any other."""
    file = directory / ORIGIN
    if not file.is_file():
        return {}
    pieces = json.loads(file.read_text(encoding="utf-8")).get("pieces", {})
    return {int(token): ids for token, ids in pieces.items()}


def vocabulary_of(path: str, revision: str | None, *, trust_remote_code: bool) -> dict[str, int]:
    """Token -> id of the tokenizer beside the weights of a model; empty without one."""
    try:
        return load_tokenizer(path, revision=revision, trust_remote_code=trust_remote_code).get_vocab()
    except RecipeError:
        return {}


def pieces_of(before: PreTrainedTokenizerBase, after: PreTrainedTokenizerBase) -> Pieces:
    """How a tokenizer splits the texts of the tokens that another one has in addition, without unknown tokens."""
    old, unknown_id = before.get_vocab(), before.unk_token_id
    pieces = {}
    for token, token_id in sorted(after.get_vocab().items(), key=lambda each: each[1]):
        if token not in old:
            added = after.added_tokens_decoder.get(token_id)
            ids = _encoded(before, token) if added is not None else _split_word(before, token)
            pieces[token_id] = [each for each in ids if each != unknown_id]
    return pieces


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def _split_word(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int]:
    """The pieces of a word that is written as in the vocabulary, such as Ġword."""
    return [token.id for token in tokenizer.backend_tokenizer.model.tokenize(word)]


def _save(tokenizer: PreTrainedTokenizerBase, unfinished: Path, directory: Path) -> None:
    with writing(directory):
        tokenizer.save_pretrained(unfinished)


def contents_of(directory: Path) -> str:
    """A hash of the names and contents of a directory's files."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != ORIGIN)
    return fingerprint({path.name: hashlib.blake2b(path.read_bytes()).hexdigest() for path in files})
