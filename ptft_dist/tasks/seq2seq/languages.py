"""Tokenizers that mark each text with its language, as those of NLLB and mBART do."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ptft_dist.data.tokenizer import added_around, marks_languages
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.seq2seq.settings import Seq2SeqSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Mark(NamedTuple):
    """The token of the target's language, and whether targets begin with it (NLLB, mBART-50) or end (mBART)."""

    token_id: int
    first: bool


def check_languages(tokenizer: PreTrainedTokenizerBase, settings: Seq2SeqSettings) -> None:
    """Raises RecipeError if the languages of the recipe do not fit the tokenizer."""
    given = {"source_language": settings.source_language, "target_language": settings.target_language}
    name = tokenizer.name_or_path
    if not marks_languages(tokenizer):
        for key, language in given.items():
            if language is not None:
                raise RecipeError(f"seq2seq.{key}: has no effect: {name} does not mark texts with their language")
        return
    if not hasattr(tokenizer, "set_src_lang_special_tokens"):
        raise RecipeError(
            f"tokenizer: {name} marks texts with their language in a way that is not supported. Supported are the fast "
            "tokenizers of NLLB and mBART; T5 and mT5 name the languages in seq2seq.prefix"
        )
    vocabulary = tokenizer.get_vocab()
    for key, language in given.items():
        if language is None:
            raise RecipeError(
                f"seq2seq.{key}: {name} marks texts with their language: set source_language and target_language to "
                "the tokens of the languages, such as eng_Latn and deu_Latn (NLLB) or en_XX and de_DE (mBART)"
            )
        if language not in vocabulary:
            known = [token for token in tokenizer.all_special_tokens if "_" in token]
            raise RecipeError(f"seq2seq.{key}: {language} is no language of {name}, which has {', '.join(known)}")


def speak(tokenizer: PreTrainedTokenizerBase, language: str | None) -> None:
    """Mark the texts that the tokenizer encodes from now on with this language, if it marks any."""
    if language is not None:
        tokenizer.src_lang = language


def mark_of_targets(tokenizer: PreTrainedTokenizerBase, settings: Seq2SeqSettings) -> Mark | None:
    """How targets are marked; None if the tokenizer marks no texts."""
    if settings.target_language is None:
        return None
    speak(tokenizer, settings.target_language)
    before, _ = added_around(tokenizer)
    speak(tokenizer, settings.source_language)
    token_id = tokenizer.get_vocab()[settings.target_language]
    return Mark(token_id, token_id in before)
