"""Encodes rows with a source text and a target text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptft_dist.data.encoder import EncoderContext, Example, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.row_encoder import RowEncoder, require_all, require_text
from ptft_dist.data.tokenizer import text_only_backend
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.seq2seq.languages import check_languages, speak
from ptft_dist.tasks.seq2seq.settings import Seq2SeqSettings

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

SOURCE_CUT = "with a source truncated to data.max_length"
TARGET_CUT = "with a target truncated to seq2seq.max_target_length"


class Seq2SeqRows(RowEncoder):
    """Encodes source and target. Columns: input_ids (prefix and source) and labels (target).

    Both include the tokenizer's special tokens, and exactly one EOS.
    """

    answer_roles = ("target",)
    columns = {"labels": "token"}
    length_columns = ("input_ids", "labels")

    settings: Seq2SeqSettings

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        tokenizer, settings = self.tokenizer, self.settings
        check_languages(tokenizer, settings)
        for role, use in (("eos", "every source and target ends with it"), ("pad", "batches are padded with it")):
            if getattr(tokenizer, f"{role}_token_id") is None:
                raise RecipeError(
                    f"tokenizer: {tokenizer.name_or_path} has no {role.upper()} token, and {use}. Name one as "
                    f"{role}_token in its tokenizer_config.json, or use another tokenizer."
                )
        speak(tokenizer, settings.target_language)
        self.target = Side(tokenizer, settings.max_target_length, "seq2seq.max_target_length")
        speak(tokenizer, settings.source_language)
        self.source = Side(tokenizer, self.max_length, "data.max_length", settings.prefix)

    @classmethod
    def check(cls, settings: Seq2SeqSettings, record: Record) -> None:
        require_all(record.values, cls.required(settings))
        for role in cls.required(settings):
            require_text(record.values, role)

    @classmethod
    def texts(cls, settings: Seq2SeqSettings, record: Record) -> Iterator[str]:
        yield settings.prefix + record.values["source"]
        yield record.values["target"]

    @classmethod
    def unanswered(
        cls,
        settings: Seq2SeqSettings,  # noqa: ARG003
        survey: Mapping[str, Any],  # noqa: ARG003
        values: Mapping[str, Any],
    ) -> dict[str, Any]:
        return {**values, "target": require_text(values, "source")}

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
    """Tokenizes and truncates the texts of one side: sources or targets."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, setting: str, prefix: str = "") -> None:
        """Set the truncation.

        Args:
            max_length: maximum number of tokens, special tokens included.
            setting: the recipe's key of max_length, for messages.

        Raises:
            RecipeError: max_length leaves no room for a text.
        """
        self.backend, self.eos_id = text_only_backend(tokenizer), int(tokenizer.eos_token_id)
        overhead = self.backend.encode(prefix)
        self.added = [] if self.eos_id in overhead.ids else [self.eos_id]
        overhead_tokens = len(overhead.ids) + len(self.added)
        if max_length <= overhead_tokens:
            what = "prefix and special" if prefix else "special"
            raise RecipeError(
                f"{setting}: {max_length} leaves no room for a text beside {overhead_tokens} {what} tokens. Raise it."
            )
        self.backend.enable_truncation(max_length - len(self.added))

    def encode(self, texts: Sequence[str]) -> list[Encoding]:
        return self.backend.encode_batch(list(texts), add_special_tokens=True)

    def ids(self, encoding: Encoding, role: str) -> list[int]:
        """The token ids of a text. Raises RowError if it has no token, or contains EOS."""
        text = [i for i, special in zip(encoding.ids, encoding.special_tokens_mask, strict=True) if not special]
        if not text:
            raise RowError(f"the tokenizer returns no token for the field {role!r}. Correct or remove the row.")
        if self.eos_id in text:
            raise RowError(
                f"the field {role!r} contains the text of the EOS token, and this tokenizer always encodes it as EOS. "
                "Remove it from the text."
            )
        return [*encoding.ids, *self.added]
