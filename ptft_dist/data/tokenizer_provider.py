"""The tokenizer of a recipe: loaded or learned, and then extended; in the cache under a fingerprint."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptft_dist.data import stream
from ptft_dist.data.cache import fingerprint
from ptft_dist.data.inputs import Inputs
from ptft_dist.data.tokenizer import first_megabytes, load_tokenizer, train_tokenizer
from ptft_dist.data.tokenizer_extension import EXTENSION_VERSION, extend
from ptft_dist.data.tokenizer_files import Pieces, TokenizerFiles, pieces_of, read_pieces
from ptft_dist.data.tokenizer_learning import LEARNING_VERSION
from ptft_dist.errors import RecipeError
from ptft_dist.reporting.messages import progress, say

CHANGES_VERSION = 2
"""Part of the fingerprint of a tokenizer with added tokens. Increase it when they are added in another way."""
TEXTS_VERSION = 3
"""Part of the fingerprint of a learned tokenizer. Increase it when the same sources give other texts than before."""


class TokenizerProvider:
    """Learns, loads and changes the tokenizer of a recipe."""

    def __init__(self, inputs: Inputs, cache: Path) -> None:
        """cache: the directory of the cache."""
        self._inputs, self._recipe, self._base, self._encoder = inputs, inputs.recipe, inputs.base, inputs.encoder
        self._files = TokenizerFiles(cache / "tokenizers", inputs.memo)
        trusted = self._recipe.tokenizer.trust_remote_code
        # Cached, because fingerprint and encoder may load the same tokenizer. Neither changes it.
        self.load = functools.cache(partial(load_tokenizer, trust_remote_code=trusted))

    def local_fingerprint(self) -> str | None:
        """A hash of a tokenizer in a local directory; None for one that is learned or comes from the Hub."""
        path = self._recipe.tokenizer.path
        return None if path is None else self._files.fingerprint_local(path, self._base)

    def provide(self, given: Path | None) -> tuple[str, Path]:
        """Train or load the tokenizer; return its fingerprint and its directory. One in the cache is not loaded.

        given: the directory of a tokenizer that was trained earlier.
        """
        section, files = self._recipe.tokenizer, self._files
        if section.train is not None and given is not None:
            load_tokenizer(given)  # raises its errors here
            return files.fingerprint_of_copy(given), given.absolute()
        if section.train is not None:
            name, directory = files.build(self._trained_fingerprint(), self._train_tokenizer)
        else:
            assert section.path is not None
            name, directory = files.load(section.path, self._base, section.revision, section.trust_remote_code)
        if self.changes() == [(), None]:
            return name, directory
        changed = self.changed_print(name)
        return changed, files.build_changed(changed, partial(self._change_tokenizer, directory))

    def changes(self) -> list[Any]:
        """The tokens and the chat template that are added to the tokenizer, and what new tokens are learned from."""
        section, settings = self._recipe.tokenizer, self._recipe.settings
        template = self._encoder.tokenizer_template(settings, self._base, learned=section.train is not None)
        added = (*section.add, *settings.added_tokens)
        if section.extend is None:
            return [added, template]
        learned = [EXTENSION_VERSION, version("tokenizers"), section.extend.model_dump(), self._inputs.texts]
        return [added, template, learned]

    def unchanged_name(self) -> str:
        """The fingerprint of the tokenizer before `changes`. Raises RecipeError if it cannot be loaded."""
        section = self._recipe.tokenizer
        if section.train is not None:
            return self._trained_fingerprint()
        assert section.path is not None
        return self._files.load(section.path, self._base, section.revision, section.trust_remote_code)[0]

    def has_tokenizer(self, given: Path | None) -> bool:
        """Whether no tokens need to be learned from the texts. given: see `provide`."""
        section = self._recipe.tokenizer
        if section.train is not None:
            return given is not None or self._files.has(self._trained_fingerprint())
        return section.extend is None or self._files.has_changed(self.changed_print(self.unchanged_name()))

    def _trained_fingerprint(self) -> str:
        settings = self._recipe.tokenizer.train
        assert settings is not None
        learners = {"bpe": (), "wordpiece": (LEARNING_VERSION,), "unigram": (LEARNING_VERSION, "sentencepiece")}
        return fingerprint(
            {
                "version": TEXTS_VERSION,
                "tokenizers": version("tokenizers"),
                "learner": [each if isinstance(each, int) else version(each) for each in learners[settings.algorithm]],
                "settings": settings.model_dump(),
                "special": [self._recipe.settings.special_tokens, self._recipe.settings.extra_special_tokens],
                **self._inputs.texts,
            }
        )

    def changed_print(self, name: str) -> str:
        """The fingerprint of the tokenizer after `changes`. name: that of the tokenizer before."""
        return fingerprint([CHANGES_VERSION, name, *self.changes(), version("transformers")])

    def _change_tokenizer(self, directory: Path) -> tuple[Any, Pieces]:
        """The tokenizer of a directory with the tokens and the template of `changes`, and the pieces of the tokens."""
        from tokenizers import AddedToken

        added, template, *_ = self.changes()
        before = load_tokenizer(directory, trust_remote_code=self._recipe.tokenizer.trust_remote_code)
        if (extension := self._recipe.tokenizer.extend) is None:
            tokenizer = load_tokenizer(directory, trust_remote_code=self._recipe.tokenizer.trust_remote_code)
        else:
            what = f"learning {extension.tokens:,} new tokens from the training texts"
            with self._texts(what, extension.max_megabytes) as texts:
                tokenizer = extend(before, extension, texts)
        known = tokenizer.get_vocab()
        _check_new(self._recipe.tokenizer.add, tokenizer, known)
        if template is not None:
            tokenizer.chat_template = template
        control = str(tokenizer.chat_template or "")
        for token in added:
            special = _is_control(token, control)
            # As transformers adds them: words are looked for in the normalized text, so in any case if that is ignored.
            normalized = not special and token in self._recipe.tokenizer.add
            tokenizer.add_tokens([AddedToken(token, normalized=normalized, special=special)])
        _check_ids(known, tokenizer, added)
        # Those of the directory were added by an earlier `build_changed`, and may be new to the network as well.
        return tokenizer, read_pieces(directory) | pieces_of(before, tokenizer)

    def _train_tokenizer(self) -> Any:
        settings, rows = self._recipe.tokenizer.train, self._recipe.settings
        assert settings is not None
        what = f"training a tokenizer of {settings.vocab_size:,} tokens on the training texts"
        with self._texts(what, None) as texts:
            return train_tokenizer(settings, texts, rows.special_tokens, rows.extra_special_tokens)

    @contextlib.contextmanager
    def _texts(self, what: str, megabytes: float | None) -> Iterator[Iterator[str]]:
        """The training texts, or the first megabytes of them, with a progress bar. Raises DataError if a source is
        changed meanwhile."""
        say(f"{what} ...")
        with progress(what, unit="bytes") as shown:

            def measured(text: str) -> str:
                shown.advance(len(text.encode()))
                return text

            texts = stream.training_texts(self._recipe, self._inputs.records, self._encoder)
            yield map(measured, first_megabytes(texts, megabytes))
        self._inputs.check_unchanged()


def _check_new(words: Sequence[str], tokenizer: Any, known: Mapping[str, int]) -> None:
    """Raises RecipeError if a word is a token of the tokenizer, perhaps in the spelling of its bytes."""
    for word in words:
        ids = [known[word]] if word in known else tokenizer.encode(word, add_special_tokens=False)
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
            spelling = tokenizer.convert_ids_to_tokens(ids[0])
            shown = "" if spelling == word else f", {spelling!r} in its vocabulary"
            raise RecipeError(f"tokenizer.add: {word!r} is already a token{shown}. Remove it.")


def _check_ids(known: Mapping[str, int], tokenizer: Any, added: Iterable[str]) -> None:
    """Raises RecipeError if an added token has the id of a known one: `tokenizers` counts tokens to find a free id."""
    owners = {i: token for token, i in known.items()}
    for token in added:
        if token not in known and (owner := owners.get(i := tokenizer.convert_tokens_to_ids(token))) is not None:
            raise RecipeError(
                f"tokenizer: {token!r} would get the id {i}, which {owner!r} has, because smaller ids have no token. "
                "Use a tokenizer without gaps in its ids, or add no tokens"
            )


def _is_control(token: str, template: str) -> bool:
    """Whether the chat template puts the token around texts, such as <|im_start|>, so that it is a special token. What
    begins and ends with a letter or digit is a word, for example of the system prompt in the template."""
    return token in template and not (token[0].isalnum() and token[-1].isalnum())
