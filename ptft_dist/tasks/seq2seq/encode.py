"""Rows with a source and a target text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ptft_dist.data.encoder import EncoderContext, Example, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.row_encoder import RowEncoder, require_text
from ptft_dist.data.tokenizer import text_only_backend
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.seq2seq.settings import Seq2SeqSettings

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

SOURCE_CUT = "with a source truncated to data.max_length"
TARGET_CUT = "with a target truncated to seq2seq.max_target_length"


class Seq2SeqRows(RowEncoder):
    """Columns: input_ids, the source behind the prefix, and labels, the target. Both have the tokenizer's own special
    tokens around them and exactly one EOS."""

    columns = {"labels": "token"}
    length_columns = ("input_ids", "labels")

    settings: Seq2SeqSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        tokenizer, settings = self.tokenizer, self.settings
        if any(hasattr(tokenizer, name) for name in ("src_lang", "tgt_lang", "lang_code_to_id")):
            raise RecipeError(
                f"tokenizer: {tokenizer.name_or_path} adds a language code to every text (as those of NLLB and mBART "
                "do), and would mark targets with the source's language. Such tokenizers are not supported. Use "
                "another one."
            )
        for role, use in (("eos", "every source and target ends with it"), ("pad", "batches are padded with it")):
            if getattr(tokenizer, f"{role}_token_id") is None:
                raise RecipeError(
                    f"tokenizer: {tokenizer.name_or_path} has no {role.upper()} token, and {use}. Name one as "
                    f"{role}_token in its tokenizer_config.json, or use another tokenizer."
                )
        self.source = Side(tokenizer, self.max_length, "data.max_length", settings.prefix)
        self.target = Side(tokenizer, settings.max_target_length, "seq2seq.max_target_length")

    @classmethod
    def check(cls, settings: Seq2SeqSettings, record: Record) -> None:
        for role in cls.required(settings):
            require_text(record.values, role)

    @classmethod
    def texts(cls, settings: Seq2SeqSettings, record: Record) -> Iterator[str]:
        yield settings.prefix + record.values["source"]
        yield record.values["target"]

    def pieces(self, record: Record) -> Sequence[Any]:
        return [self.settings.prefix + record.values["source"], record.values["target"]]

    def encode(self, pieces: Sequence[Any]) -> list[Encoding]:
        sides = self.source.encode(pieces[::2]), self.target.encode(pieces[1::2])
        return [encoding for pair in zip(*sides, strict=True) for encoding in pair]

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        source, target = encodings
        columns = {"input_ids": self.source.ids(source, "source"), "labels": self.target.ids(target, "target")}
        cuts = ((SOURCE_CUT, source.overflowing), (TARGET_CUT, target.overflowing))
        meta = {"source": record.values["source"], "reference": record.values["target"]}
        return [Example(columns, meta, tuple(note for note, cut in cuts if cut))]


class Side:
    """How texts of one side become ids, and where they are truncated."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int, setting: str, prefix: str = "") -> None:
        """longest: tokens, special ones included; setting: where the recipe says so.

        Raises:
            RecipeError: nothing of a text would be left.
        """
        self.backend, self.eos_id = text_only_backend(tokenizer), int(tokenizer.eos_token_id)
        around = self.backend.encode(prefix)
        self.added = [] if self.eos_id in around.ids else [self.eos_id]
        taken = len(around.ids) + len(self.added)
        if longest <= taken:
            what = "the prefix and the special tokens" if prefix else "the special tokens"
            raise RecipeError(
                f"{setting}: {longest} leaves no room for a text beside {what}, {taken} tokens. Raise it."
            )
        self.backend.enable_truncation(longest - len(self.added))

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        return self.backend.encode_batch(list(texts), add_special_tokens=True)

    def ids(self, encoding: Encoding, role: str) -> list[int]:
        """Raises RowError if the text has no token, or an EOS in its middle."""
        text = [i for i, special in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if not special]
        if not text:
            raise RowError(f"the field {role!r} has no token in this tokenizer. Correct or remove the row.")
        if self.eos_id in text:
            raise RowError(
                f"the field {role!r} spells the tokenizer's EOS token, which this tokenizer can only read as the end. "
                "Remove it from the text."
            )
        return [*encoding.ids, *self.added]
