"""What an encoder is: one task's records become examples, and a writer puts them into a store.

`prepare` is given the encoder's class by its caller, so nothing in `data/` knows a task. All that is needed before
there is a tokenizer is a class method that receives the task's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

from ptft_dist.config.recipe import Recipe, Source
from ptft_dist.data.formats import Record
from ptft_dist.data.report import Entry
from ptft_dist.data.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["train", "validation"]


class RowError(Exception):
    """This record cannot be used. The message says why and what to do, but not where: the caller adds file and line."""


class LeftOut(Exception):
    """A well-formed record is dropped. The text completes "3 rows ...", such as "longer than data.max_length"."""


@dataclass(frozen=True)
class EncoderContext:
    """What an encoder is made with."""

    settings: Any
    """The task's section of the recipe."""
    task: str
    """The task's name, for messages."""
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Tokens of a row at most."""
    seed: int
    tokenizer_learned: bool = False
    """The tokenizer was learned for this recipe, not loaded from a directory or the Hub."""
    survey: Mapping[str, Any] = field(default_factory=dict)
    """What `Encoder.survey_of` found in the training records."""

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, survey: Mapping[str, Any] | None = None) -> Self:
        return cls(
            recipe.settings,
            recipe.task,
            tokenizer,
            recipe.data.max_length,
            recipe.train.seed,
            recipe.tokenizer.train is not None,
            survey or {},
        )


@dataclass(frozen=True)
class Example:
    """One entry of the store. columns: name -> values; meta: what an evaluation must know of it, JSON;
    notes: what was done to it, such as "truncated to data.max_length", for the report."""

    columns: Mapping[str, Any]
    meta: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of one record: examples, or the reason why it is a bad row (`problem`) or was dropped."""

    examples: Sequence[Example] = ()
    problem: str | None = None
    dropped: str | None = None
    unknown_tokens: int = 0

    def without_meta(self) -> Outcome:
        return replace(self, examples=[Example(e.columns, {}, e.notes) for e in self.examples])


class Writer(Protocol):
    """Writes one side's store as a stream."""

    @property
    def notes(self) -> Mapping[str, Entry]:
        """What the writer itself did to examples, by reason."""

    def add(self, example: Example) -> None:
        """
        Raises:
            OSError: the disk is full, or another error of writing.
        """

    def close(self) -> dict[str, Any]:
        """Finish the files; returns what store.json says.

        Raises:
            OSError: the disk is full, or another error of writing.
        """


class Encoder:
    """One task's records -> examples."""

    reads: ClassVar[Literal["document", "row"]]
    """What a record is, for messages."""
    chunk_records: ClassVar[int]
    """Records that are encoded together."""
    uses_processes: ClassVar[bool]
    """Encoding is Python code: long data are encoded in several processes. Otherwise the tokenizer library's own
    threads are enough."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Libraries beside `tokenizers` whose version decides how rows come out."""
    surveys: ClassVar[bool] = False
    """`survey_of` has something to find out; it costs a pass over the data."""
    numbered: ClassVar[str | None] = None
    """The key of `Example.meta` for the number of the record, counted from 1 over all records that gave examples."""
    store: ClassVar[type[Any]]
    """The class that reads what `writer` writes."""

    def __init__(self, context: EncoderContext) -> None:
        """
        Raises:
            RecipeError: the tokenizer cannot do what the task needs.
        """
        self.settings, self.tokenizer, self.max_length = context.settings, context.tokenizer, context.max_length
        self.survey: dict[str, Any] = dict(context.survey)
        """What was found in the training records; `count` may add to it."""
        self.discovered: dict[str, Any] = {}
        """What encoding finds out about the tokenizer, added to the survey. It does not depend on the records."""

    # --- before there is a tokenizer ---------------------------------------------------------------------------------

    @classmethod
    def read(cls, settings: Any, source: Source, base: Path) -> Iterator[Record]:
        """The records of a source. Raises DataError as `read_documents`."""
        raise NotImplementedError

    @classmethod
    def key(cls, record: Record) -> str:
        """The text of which a hash decides the side: training or validation."""
        raise NotImplementedError

    @classmethod
    def check(cls, settings: Any, record: Record) -> None:
        """
        Raises:
            RowError: the record cannot be used.
        """

    @classmethod
    def texts(cls, settings: Any, record: Record) -> Iterator[str]:
        """What a tokenizer may learn from this record, which has passed `check`."""
        raise NotImplementedError

    @classmethod
    def survey_of(cls, settings: Any, records: Iterable[Record]) -> dict[str, Any]:  # noqa: ARG003
        """What must be known of all training records before one is encoded, such as the labels: JSON. The records have
        passed `check`. Called only if `surveys`.

        Raises:
            DataError: the records together make no sense.
        """
        return {}

    @classmethod
    def tokenizer_template(cls, settings: Any, base: Path, *, learned: bool) -> str | None:  # noqa: ARG003
        """The chat template that the tokenizer is saved with; None: its own, or none. learned: the tokenizer is learned
        here.

        Raises:
            RecipeError: there is no such template.
        """
        return None

    @classmethod
    def store_settings(
        cls,
        settings: Any,
        common: Mapping[str, Any],
        adds_bos: Callable[[], bool],  # noqa: ARG003
    ) -> dict[str, Any]:
        """What decides how rows come out, for the store's fingerprint: JSON.

        Args:
            common: task, bad_rows and seed.
            adds_bos: whether the tokenizer itself begins a text with BOS. To answer, the tokenizer may have to be
                loaded, so this is called only if the rows depend on it.
        """
        section = settings.model_dump(exclude=set(settings.after_prepare))
        return {**common, "section": section, "seed": common["seed"] if settings.draws else None}

    @classmethod
    def text_settings(cls, settings: Any, common: Mapping[str, Any]) -> list[Any]:
        """What decides which texts a tokenizer learns from, for the tokenizer's fingerprint: JSON."""
        section = settings.model_dump(exclude=set(settings.after_prepare))
        if common["bad_rows"] == "stop":  # otherwise every setting may decide which rows are usable
            section = {key: value for key, value in section.items() if key in settings.text_settings}
        return [common["task"], section, common["bad_rows"]]

    # --- with it -----------------------------------------------------------------------------------------------------

    def admit(self, record: Record) -> None:
        """Called once per record in reading order, always in the same process: for checks that compare records.

        Raises:
            RowError: the record cannot be used.
        """

    def outcomes(self, records: Sequence[Record]) -> list[Outcome]:
        """What becomes of each record. It must not depend on other records: they may be encoded by other processes.

        Raises:
            DataError: a record can be neither used nor skipped.
        """
        raise NotImplementedError

    def count(self, example: Example) -> None:
        """Called once per training example in order, augmented copies included; what it counts goes to `survey`."""

    def warnings(self) -> list[str]:
        """What the report must warn of, whatever the records are."""
        return []

    def writer(self, path: Path, side: Side) -> Writer:
        """The writer of one side's store at `path`."""
        raise NotImplementedError


__all__ = [
    "Encoder",
    "EncoderContext",
    "Example",
    "LeftOut",
    "Outcome",
    "RowError",
    "Side",
    "Store",
    "Writer",
]
