"""What all encoders of rows share: a row is checked, its texts are tokenized with many others, it is put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.example_store import token_dtype
from ptft_dist.data.formats import Record, json_type, text_problem
from ptft_dist.data.tokenizer import text_only_backend
from ptft_dist.errors import RecipeError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase


class RowError(Exception):
    """This row cannot be used; the message says why and what to do, and not where: the caller knows."""


@dataclass(frozen=True)
class Example:
    """One row of the store. columns: name -> values; meta: what an evaluation must know of it, JSON;
    notes: what was done to it on the way, such as "cut", for the report."""

    columns: Mapping[str, Any]
    meta: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class RowEncoder:
    """One task's rows -> examples. A subclass says what a row must have, which texts it holds, and what becomes of it.

    All that is needed before there is a tokenizer is a class method.
    """

    columns: ClassVar[Mapping[str, str]] = {}
    """The store's columns beside input_ids and meta: name -> NumPy data type, `token` for token ids."""
    length_columns: ClassVar[tuple[str, ...]] = ("input_ids",)
    """The columns whose lengths together are a row's length."""
    pretokenized: ClassVar[bool] = False
    """`pieces` gives lists of words instead of texts."""
    add_special_tokens: ClassVar[bool] = False
    """The tokenizer puts its own special tokens around each piece ([CLS], [SEP])."""
    surveys: ClassVar[bool] = False
    """`survey` has something to find out."""
    text_only: ClassVar[bool] = True
    """What a text spells is text, even if it spells a special token."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, facts: Mapping[str, Any]) -> None:
        """facts: what `survey` found.

        Raises:
            RecipeError: the tokenizer cannot do what the task needs.
        """
        if not tokenizer.is_fast:
            raise RecipeError(f"tokenizer: task {recipe.task} needs a fast tokenizer (one with a tokenizer.json)")
        self.recipe, self.tokenizer, self.facts = recipe, tokenizer, dict(facts)
        self.max_length = recipe.data.max_length
        self.backend = text_only_backend(tokenizer)
        self.backend.encode_special_tokens = self.text_only
        self.token_dtype = token_dtype(max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1))

    # --- before there is a tokenizer ---------------------------------------------------------------------------------

    @classmethod
    def required(cls, recipe: Recipe) -> tuple[str, ...]:
        """The roles that every row must have a column for."""
        return recipe.settings.roles

    @classmethod
    def check(cls, recipe: Recipe, record: Record) -> None:
        """
        Raises:
            RowError: the row cannot be used.
        """
        for role in cls.required(recipe):
            require(record.values, role)

    @classmethod
    def texts(cls, recipe: Recipe, record: Record) -> Iterator[str]:
        """What a tokenizer may learn from this row, which has passed `check`."""
        raise NotImplementedError

    @classmethod
    def survey(cls, recipe: Recipe, records: Iterable[Record]) -> dict[str, Any]:  # noqa: ARG003
        """What must be known of all training rows before one is encoded, such as the labels: JSON. The rows have passed
        `check`. Called if `surveys`: it costs a pass over the data.

        Raises:
            DataError: the rows together make no sense.
        """
        return {}

    # --- with it -----------------------------------------------------------------------------------------------------

    def pieces(self, record: Record) -> Sequence[Any]:
        """What is to be tokenized: texts, pairs of texts, or (`pretokenized`) lists of words. Raises RowError."""
        raise NotImplementedError

    def build(self, record: Record, encodings: Sequence[Encoding]) -> list[Example]:
        """The examples of a row from its tokenized pieces.

        Raises:
            RowError: the row cannot be used after all.
            LeftOut: it is well formed, but has no use here.
        """
        raise NotImplementedError

    def count(self, example: Example) -> None:
        """Is told of every example that training gets, copies among them; what it counts belongs into `facts`."""

    def encode(self, pieces: Sequence[Any]) -> list[Encoding]:
        return self.backend.encode_batch(
            list(pieces), is_pretokenized=self.pretokenized, add_special_tokens=self.add_special_tokens
        )


class LeftOut(Exception):
    """Raised by `build` for a row that is well formed but has no use here; the text is the reason, for the report."""


def require(values: Mapping[str, Any], role: str) -> Any:
    """The value of a role.

    Raises:
        RowError: there is none.
    """
    if role not in values:
        has = ", ".join(map(repr, values)) or "none"
        raise RowError(
            f"there is no field {role!r}; the fields are: {has}. Name the one that holds it with fields: "
            f"{{{role}: ...}}."
        )
    if values[role] is None:
        raise RowError(f"the field {role!r} is null. Fill it in, or remove the row.")
    return values[role]


def require_text(values: Mapping[str, Any], role: str, *, empty: bool = False) -> str:
    """The text of a role. empty: it may have no visible character.

    Raises:
        RowError: there is none.
    """
    text = require(values, role)
    if problem := text_problem(role, text):
        raise RowError(problem)
    if not empty and not text.strip():
        raise RowError(f"the field {role!r} is empty. Fill it in, or remove the row.")
    return text


def require_list(values: Mapping[str, Any], role: str) -> list[Any]:
    """
    Raises:
        RowError: the role's value is not a list.
    """
    found = require(values, role)
    if not isinstance(found, list):
        raise RowError(f"the field {role!r} holds {json_type(found)} and not a list. Correct or remove the row.")
    return found
