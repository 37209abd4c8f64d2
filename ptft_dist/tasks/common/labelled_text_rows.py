"""A text or a pair of texts between the tokenizer's special tokens: what classification and regression share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.formats import Record
from ptft_dist.data.row_encoder import LeftOut, RowEncoder, require_text
from ptft_dist.data.tokenizer import check_can_pad
from ptft_dist.errors import RecipeError
from ptft_dist.tasks.common.labelled_text_settings import LabelledText

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

CUT = "cut to data.max_length"


class LabelledTextRows(RowEncoder):
    """Columns: input_ids and token_type_ids (which of the two texts a token belongs to), [T]."""

    columns = {"token_type_ids": "u1"}
    add_special_tokens = True

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any]) -> None:
        super().__init__(recipe, tokenizer, facts)
        around = tokenizer.num_special_tokens_to_add(pair=_section(recipe).pair)
        if self.max_length <= around:
            raise RecipeError(f"data.max_length: {self.max_length} leaves no room beside {around} special tokens")
        check_can_pad(tokenizer)
        self.backend.enable_truncation(self.max_length, strategy="longest_first")

    @classmethod
    def check(cls, recipe: Recipe, record: Record) -> None:
        super().check(recipe, record)
        for role in ("text", "text_pair") if _section(recipe).pair else ("text",):
            require_text(record.values, role)

    @classmethod
    def texts(cls, recipe: Recipe, record: Record) -> Iterator[str]:
        yield record.values["text"]
        if _section(recipe).pair:
            yield record.values["text_pair"]

    def pieces(self, record: Record) -> Sequence[Any]:
        values = record.values
        return [(values["text"], values["text_pair"]) if _section(self.recipe).pair else values["text"]]

    def text_columns(self, encoding: Encoding) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The columns of the text, and the note that it was cut.

        Raises:
            LeftOut: the text comes to no token.
        """
        if not encoding.ids:
            raise LeftOut("left out, for the tokenizer makes nothing of the text")
        notes = (CUT,) if encoding.overflowing else ()
        return {"input_ids": encoding.ids, "token_type_ids": encoding.type_ids}, notes


def _section(recipe: Recipe) -> LabelledText:
    section = recipe.settings
    assert isinstance(section, LabelledText)
    return section
