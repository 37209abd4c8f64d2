"""Base encoder of classification and regression: one text or a pair of texts with the tokenizer's special tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ptft_dist.data.encoder import EncoderContext, LeftOut
from ptft_dist.data.formats import Record
from ptft_dist.data.row_encoder import RowEncoder, require_text
from ptft_dist.data.tokenizer import check_can_pad
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.common.frame import Frame
from ptft_dist.tasks.common.labelled_text_settings import LabelledText

if TYPE_CHECKING:
    from tokenizers import Encoding

CUT = "truncated to data.max_length"


class LabelledTextRows(RowEncoder):
    """Encodes a text or a pair of texts. Columns: input_ids and token_type_ids (0: first text, 1: second), both [T]."""

    columns = {"token_type_ids": "u1"}
    add_special_tokens = True

    settings: LabelledText

    def __init__(self, context: EncoderContext) -> None:
        super().__init__(context)
        special_tokens = self.tokenizer.num_special_tokens_to_add(pair=self.settings.pair)
        if self.max_length <= special_tokens:
            raise RecipeError(
                f"data.max_length: {self.max_length} leaves no room for a text beside {special_tokens} special tokens. "
                "Raise it."
            )
        check_can_pad(self.tokenizer)
        self.backend.enable_truncation(self.max_length, strategy="longest_first")

    @classmethod
    def check(cls, settings: LabelledText, record: Record) -> None:
        super().check(settings, record)
        for role in ("text", "text_pair") if settings.pair else ("text",):
            require_text(record.values, role)

    @classmethod
    def texts(cls, settings: LabelledText, record: Record) -> Iterator[str]:
        yield record.values["text"]
        if settings.pair:
            yield record.values["text_pair"]

    def warnings(self) -> list[str]:
        return Frame.of(self.tokenizer, self.backend, 2).unmarked() if self.settings.pair else []

    def pieces(self, record: Record) -> Sequence[Any]:
        values = record.values
        return [(values["text"], values["text_pair"]) if self.settings.pair else values["text"]]

    def text_columns(self, encoding: Encoding) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The columns of the text, and a note for the data report if it was truncated.

        Raises:
            LeftOut: the text has no token.
        """
        if not encoding.ids:
            raise LeftOut("with a text for which the tokenizer returns no token")
        notes = (CUT,) if encoding.overflowing else ()
        return {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}, notes
