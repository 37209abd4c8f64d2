"""The data section of a recipe: sources, cleaning, the split into training and validation, augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, PrivateAttr, model_validator

from ptft_dist.config.cleaning import StepSection
from ptft_dist.config.section import ModelName, NonNegative, Positive, Section, Text, exactly_one, only_with


class Source(Section):
    """A source of documents or rows: a built-in corpus, files, or a dataset of the Hugging Face Hub."""

    source: Literal["python-stdlib", "python-functions"] | None = None
    """`python-stdlib`: the source code of Python's standard library, one document per module. `python-functions`: its
    documented functions, one row each, with columns for every task (listed in `ptft_dist/data/builtin.py`)."""
    path: Text | None = None
    """A file or a glob (`**` matches subfolders): .txt, .jsonl, .json, .csv, .tsv, .conll, also .gz and .zst; .parquet,
    .arrow; or a directory of `datasets.save_to_disk`.
    A relative path starts at the recipe's directory."""
    hub: Text | None = None
    """The name of a Hub dataset, as for `datasets.load_dataset`."""
    config: Text | None = None
    """The configuration of a Hub dataset."""
    revision: Text | None = None
    """The commit, branch or tag of a Hub dataset."""
    split: Text | None = None
    """The split of a Hub dataset. Default: `train`."""
    streaming: bool = False
    """Read a Hub dataset without downloading it first, for one that is larger than the disk."""
    field: Text | None = None
    """Pretraining tasks: the column with the text, in every format but .txt. Default: `text`."""
    fields: dict[Text, Text] = Field(default_factory=dict)
    """Column mapping of all other tasks: role -> column, such as {text: sentence, label: gold}. A column with the name
    of its role needs no entry. docs/tasks.md lists the roles."""
    document: Literal["file", "paragraph", "line"] | None = None
    """What a document is in a .txt file: the whole file (default), each block between empty lines, or each line."""
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """A name for data.mixing and reports."""
    limit: PositiveInt | None = None
    """Use the first this many documents only."""
    _files: tuple[Path, ...] | None = PrivateAttr(None)
    _key: str | None = PrivateAttr(None)

    def part(self, files: Sequence[Path]) -> Self:
        """This source with only these of its files."""
        copy = self.model_copy()
        copy._files = tuple(files)
        return copy

    def named(self, key: str) -> Self:
        """Keep the key of this source, such as data.train.0, for messages."""
        self._key = key
        return self

    @property
    def key(self) -> str | None:
        """The key in the recipe, such as data.train.0; None if it is not known."""
        return self._key

    @property
    def only_files(self) -> tuple[Path, ...] | None:
        """The files of a part of a source; None: all of them."""
        return self._files

    @model_validator(mode="after")
    def _check(self) -> Source:
        exactly_one(self, "source", "path", "hub")
        only_with(self, ("config", "revision", "split", "streaming"), self.hub is not None, "a hub data set")
        only_with(self, ("field", "fields"), self.source != "python-stdlib", "files or a data set with columns")
        only_with(self, ("document",), self.path is not None, "a path")
        return self


class Augmentation(Section):
    """Data augmentation: changed copies of the training rows of a task with labelled text, made once by `prepare`."""

    method: Literal["synonym", "swap", "delete", "back_translation"]
    """`synonym`: replace words by synonyms; `swap`: swap pairs of words; `delete`: delete words (Wei and Zou 2019,
    EDA). `back_translation`: translate into another language and back (Sennrich et al. 2016)."""
    copies: PositiveInt = 1
    """Number of copies of each row."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The fraction of the words that are changed, at least one word. Default: 0.1."""
    unit: Literal["word", "character"] | None = None
    """What a word is: text between spaces (default), or each character, as for Chinese."""
    synonyms: Text | None = None
    """`synonym`: a text file; each line is a word, a tab, and its synonyms separated by commas."""
    forward: ModelName | None = None
    """`back_translation`: the sequence-to-sequence model into the other language: a directory or a Hub name."""
    backward: ModelName | None = None
    """`back_translation`: the model back into the original language: a directory or a Hub name."""

    @model_validator(mode="after")
    def _check(self) -> Augmentation:
        back = self.method == "back_translation"
        only_with(self, ("share", "unit"), not back, "a method that changes words")
        only_with(self, ("copies",), not back, "a random method; a translation is always the same")
        only_with(self, ("forward", "backward"), back, "method: back_translation")
        only_with(self, ("synonyms",), self.method == "synonym", "method: synonym")
        if self.method == "synonym" and self.synonyms is None:
            raise ValueError("synonyms: the method needs a file of synonyms")
        if back and (self.forward is None or self.backward is None):
            raise ValueError("forward and backward: the method needs a model for each direction")
        return self


class MixturePeriod(Section):
    """A row of data.mixing.schedule."""

    from_step: Annotated[int, Field(ge=0)]
    """The first update of the period, counted from 0."""
    weights: dict[Text, NonNegative]
    """Name of each source -> its weight. A source with weight 0 is not used in the period."""


class MixingSection(Section):
    """Mixing of the training sources: which share of the rows of each update comes from which source.

    Every source has its own order and its own epochs. The source of each row is a function of its position.
    """

    weights: dict[Text, Positive] | None = None
    """Name of each source -> its weight: {web: 3, code: 1} takes three rows of web for each row of code."""
    temperature: Annotated[float, Field(ge=1.0, le=1e6)] | None = None
    """Weights from the sizes of the sources: rows^(1 / temperature) (Devlin 2018, multilingual BERT; Conneau et al.
    2020, XLM-R). 1: in proportion to their sizes. Large values: the same weight for all."""
    schedule: Annotated[tuple[MixturePeriod, ...], Field(min_length=1)] | None = None
    """A curriculum: weights that change during the run. Needs batch.global_size."""
    max_epochs: Annotated[float, Field(gt=0.0)] | None = None
    """A source that has been read this many times is left out from then on; the others keep their proportions."""

    @model_validator(mode="after")
    def _check(self) -> MixingSection:
        exactly_one(self, "weights", "temperature", "schedule")
        if self.schedule is not None:
            starts = [period.from_step for period in self.schedule]
            if starts[0] != 0 or sorted(set(starts)) != starts:
                raise ValueError("schedule: the first period needs from_step: 0, and each later one a larger number")
            for number, period in enumerate(self.schedule):
                if not any(period.weights.values()):
                    raise ValueError(f"schedule.{number}.weights: at least one source needs a weight above 0")
        return self

    @property
    def tables(self) -> dict[str, dict[str, float]]:
        """Key -> weights by the names of sources."""
        if self.schedule is not None:
            return {f"schedule.{number}.weights": period.weights for number, period in enumerate(self.schedule)}
        return {} if self.weights is None else {"weights": self.weights}


class DataSection(Section):
    """The data, and how they become rows."""

    train: Annotated[list[Source], Field(min_length=1)]
    """Training sources, read in this order."""
    validation: Annotated[float, Field(gt=0.0, lt=1.0)] | Annotated[list[Source], Field(min_length=1)] | None = None
    """A fraction of the training documents, chosen by a hash of their text; or separate sources."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Cross-validation: the number of folds, chosen by a hash. Each fold is the validation set of one run."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Run this fold only, counted from 0. Default: `ptft train` runs all folds, one after the other."""
    max_length: Annotated[int, Field(ge=2, le=2**24)] = 512
    """Maximum number of tokens in a row. A longer document continues in the next row. Other tasks document truncation
    in their own section."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What to do with a row that the task cannot use, such as one without a label: `stop` with an error that names file
    and line, or `skip` and count it."""
    mixing: MixingSection | None = None
    """Mix the training sources by weights. Default: all their rows, in one random order."""
    steps: tuple[StepSection, ...] = ()
    """Cleaning, filtering and deduplication of the records, in this order, before the split (docs/cleaning.md)."""
    augment: tuple[Augmentation, ...] = ()
    """Data augmentation of the training rows."""
    cache_dir: str | None = None
    """The cache of prepared data. Default: the environment variable PTFT_CACHE, else the user's cache directory."""
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    """Data loading processes of each rank. Default: 2 on an accelerator, 0 on a CPU."""

    @property
    def all_folds(self) -> bool:
        """Whether a training of the recipe is one run per fold."""
        return self.folds is not None and self.fold is None

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        only_with(self, ("fold",), self.folds is not None, "data.folds")
        for side, sources in (("train", self.train), ("validation", self.validation)):
            for index, source in enumerate(sources if isinstance(sources, list) else ()):
                source.named(f"data.{side}.{index}")
        if self.mixing is not None:
            self._check_mixing(self.mixing)
        if self.folds is not None and self.validation is not None:
            raise ValueError("folds and validation cannot be used together: the folds are the validation sets")
        if self.folds is not None and self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold: {self.fold}; with folds: {self.folds} it must be from 0 to {self.folds - 1}")
        return self

    def _check_mixing(self, mixing: MixingSection) -> None:
        if len(self.train) < 2:
            raise ValueError("mixing has no effect here: it needs several sources in data.train")
        names = [source.name for source in self.train]
        for index, name in enumerate(names):
            if mixing.tables and name is None:
                raise ValueError(f"train.{index}: mixing needs a name of each source; give it the key name")
            if name is not None and name in names[:index]:
                raise ValueError(f"train.{index}.name: {name} is the name of another source too")
        for key, weights in mixing.tables.items():
            if unknown := weights.keys() - set(names):
                raise ValueError(f"mixing.{key}: there is no source with the name {min(unknown)!r}")
            if missing := {str(name) for name in names} - weights.keys():
                raise ValueError(
                    f"mixing.{key}: the source {min(missing)!r} has no weight (0 is possible in a schedule)"
                )
