"""The interface of encoders: an encoder converts a task's records to examples, and its writer writes them to a store.

The caller of `prepare` passes the encoder's class, so `data/` does not depend on tasks. Methods that are needed before
the tokenizer exists are class methods and get the task's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, Self

from ptft_dist.config.recipe import Recipe, Source
from ptft_dist.data.formats import Record
from ptft_dist.data.report import Entry
from ptft_dist.data.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["train", "validation"]


class Place(NamedTuple):
    """Where a record belongs."""

    side: Side
    source: int
    """Index in data.train or, for separate validation sources, in data.validation."""


class RowError(Exception):
    """This record is invalid. The message says why and what to do; the caller adds file and line."""


class LeftOut(Exception):
    """A valid record is dropped. The text completes "3 rows ...", such as "longer than data.max_length"."""


@dataclass(frozen=True)
class EncoderContext:
    """The arguments of an encoder."""

    settings: Any
    """The task's section of the recipe."""
    task: str
    """The task's name, for messages."""
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Maximum number of tokens in a row."""
    seed: int
    tokenizer_learned: bool = False
    """The tokenizer was trained for this recipe, not loaded from a directory or the Hub."""
    survey: Mapping[str, Any] = field(default_factory=dict)
    """The result of `Encoder.survey_of` on the training records."""

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, survey: Mapping[str, Any] | None = None) -> Self:
        """The context of a recipe."""
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
    """One entry of the store."""

    columns: Mapping[str, Any]
    """Name -> values."""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Information for scoring, as JSON; stored for validation examples only."""
    notes: tuple[str, ...] = ()
    """Changes to report, such as "truncated to data.max_length"."""


@dataclass(frozen=True)
class Outcome:
    """The result of encoding one record: examples, or the reason why it has none."""

    examples: Sequence[Example] = ()
    problem: str | None = None
    """Why the record is a bad row."""
    dropped: str | None = None
    """Why a valid record was dropped."""
    unknown_tokens: int = 0

    def without_meta(self) -> Outcome:
        """A copy whose examples have no meta."""
        return replace(self, examples=[Example(e.columns, {}, e.notes) for e in self.examples])


class Writer(Protocol):
    """Writes the store of one side, example by example."""

    @property
    def notes(self) -> Mapping[str, Entry]:
        """Changes that the writer made to examples, for the report, by reason."""

    def add(self, example: Example) -> None:
        """Append an example.

        Raises:
            OSError: the disk is full, or another error of writing.
        """

    def close(self) -> dict[str, Any]:
        """Complete the files and return the contents of store.json.

        Raises:
            OSError: the disk is full, or another error of writing.
        """


class MergingWriter(Writer, Protocol):
    """The writer of an encoder that is `mergeable`."""

    def extend(self, part: Path) -> None:
        """Append all examples of a completed store. Raises DataError if it is damaged."""


class Encoder:
    """Base class: converts a task's records to examples."""

    reads: ClassVar[Literal["document", "row"]]
    """What a record is called in messages."""
    chunk_records: ClassVar[int]
    """Number of records that are encoded together."""
    uses_processes: ClassVar[bool]
    """Encode in several processes, because encoding is Python code. False: the threads of the tokenizer library are
    enough."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Libraries besides `tokenizers` whose versions affect the rows."""
    surveys: ClassVar[bool] = False
    """Call `survey_of`, which takes a pass over the data."""
    survey_of_recipe: ClassVar[bool] = False
    """The survey says how rows are encoded, whatever a model was trained on; `ptft predict` takes it again."""
    keeps_meta: ClassVar[bool] = False
    """The meta of training examples is stored too."""
    numbered: ClassVar[str | None] = None
    """The key of `Example.meta` for the number of the record, counted from 1 over all records with examples."""
    mergeable: ClassVar[bool] = False
    """The stores of several shards can be appended to each other, because no record depends on earlier ones."""
    answer_roles: ClassVar[tuple[str, ...]] = ()
    """The columns with the answers, which rows to predict do not have."""
    store: ClassVar[type[Any]]
    """The class that reads the store of `writer`."""

    def __init__(self, context: EncoderContext) -> None:
        """Take the tokenizer and the settings.

        Raises:
            RecipeError: the tokenizer is not suitable for the task.
        """
        self.settings, self.tokenizer, self.max_length = context.settings, context.tokenizer, context.max_length
        self.survey: dict[str, Any] = dict(context.survey)
        """Properties of the training records, such as the labels; `count` may add to it."""
        self.discovered: dict[str, Any] = {}
        """Properties of the tokenizer that are computed during encoding and added to the survey."""

    # --- without a tokenizer -----------------------------------------------------------------------------------------

    @classmethod
    def read(cls, settings: Any, source: Source, base: Path) -> Iterator[Record]:
        """The records of a source. Raises DataError, see `read_documents`."""
        raise NotImplementedError

    @classmethod
    def key(cls, record: Record) -> str:
        """The text whose hash decides whether the record is for training or validation."""
        raise NotImplementedError

    @classmethod
    def check(cls, settings: Any, record: Record) -> None:
        """Check that a record is valid.

        Raises:
            RowError: the record is invalid.
        """

    @classmethod
    def texts(cls, settings: Any, record: Record) -> Iterator[str]:
        """The texts of a valid record that a tokenizer is trained on."""
        raise NotImplementedError

    @classmethod
    def survey_of(cls, settings: Any, records: Iterable[Record], seed: int) -> dict[str, Any]:  # noqa: ARG003
        """Properties of all training records that must be known before encoding, such as the labels, as JSON.

        The records are valid. Called only if `surveys`. seed: train.seed.

        Raises:
            DataError: the records are unusable as a whole, for example because they all have the same label.
        """
        return {}

    @classmethod
    def tokenizer_template(cls, settings: Any, base: Path, *, learned: bool) -> str | None:  # noqa: ARG003
        """The chat template to save with the tokenizer; None: keep its own.

        Args:
            base: the directory where relative paths start.
            learned: the tokenizer is trained in this run.

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
        """The settings that affect the rows, for the store's fingerprint, as JSON.

        Args:
            common: task, bad_rows and seed.
            adds_bos: returns whether the tokenizer itself begins a text with BOS. Call it only if the rows depend on
                it, because it may have to load the tokenizer.
        """
        section = settings.model_dump(exclude=set(settings.after_prepare))
        return {**common, "section": section, "seed": common["seed"] if settings.draws else None}

    @classmethod
    def text_settings(cls, settings: Any, common: Mapping[str, Any]) -> list[Any]:
        """The settings that affect the texts for tokenizer training, for the tokenizer's fingerprint, as JSON."""
        section = settings.model_dump(exclude=set(settings.after_prepare))
        if common["bad_rows"] == "stop":  # otherwise every setting may affect which rows are valid
            section = {key: value for key, value in section.items() if key in settings.text_settings}
        return [common["task"], section, common["bad_rows"]]

    @classmethod
    def unanswered(cls, settings: Any, survey: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a row with a made-up answer, so that it can be encoded although its answer is unknown.

        Raises:
            RowError: there is nothing to answer.
        """
        raise NotImplementedError

    # --- with the tokenizer ------------------------------------------------------------------------------------------

    def admit(self, record: Record) -> None:
        """Check a record against earlier ones. Called once per record, in reading order and in one process.

        Raises:
            RowError: the record is invalid.
        """

    def outcomes(self, records: Sequence[Record]) -> list[Outcome]:
        """The outcome of each record. It must not depend on other records, which other processes may encode.

        Raises:
            DataError: a record is invalid and cannot be skipped.
        """
        raise NotImplementedError

    def length(self, example: Example) -> int:
        """The number of tokens of an example, for the report."""
        return len(example.columns["input_ids"])

    def count(self, example: Example) -> None:
        """Count an example in `survey`. Called once per training example in order, augmented copies included."""

    def warnings(self) -> list[str]:
        """Warnings for the report that do not depend on the records."""
        return []

    def writer(self, path: Path, side: Side) -> Writer:
        """The writer of one side's store at `path`."""
        raise NotImplementedError


__all__ = [
    "Encoder",
    "EncoderContext",
    "Example",
    "LeftOut",
    "MergingWriter",
    "Outcome",
    "Place",
    "RowError",
    "Side",
    "Store",
    "Writer",
]
