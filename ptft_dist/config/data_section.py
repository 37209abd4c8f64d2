"""The section of a recipe about its data: sources, the two sides, and what is done to rows before they are encoded."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.section import Section, Text, exactly_one, only_with


class Source(Section):
    """Where documents or rows come from: a built-in corpus, files, or a data set of the Hugging Face Hub."""

    source: Literal["python-stdlib", "python-functions"] | None = None
    """`python-stdlib`: the source text of the running interpreter's standard library, one document a module.
    `python-functions`: its documented functions, one row each, with columns for every task; `ptft_dist/data/builtin.py`
    lists them."""
    path: Text | None = None
    """A file or a glob (`**` goes into folders): .txt, .jsonl, .json, .csv, .tsv, .parquet, .conll, also .gz and .zst.
    A relative path starts at the recipe's directory."""
    hub: Text | None = None
    """The name of a data set for `datasets.load_dataset`."""
    config: Text | None = None
    """The configuration of a Hub data set."""
    revision: Text | None = None
    """The commit, branch or tag of a Hub data set."""
    split: Text | None = None
    """The split of a Hub data set; `train` when not given."""
    field: Text | None = None
    """Pretraining tasks: the column that holds the text, in every format but .txt; `text` when not given."""
    fields: dict[Text, Text] = Field(default_factory=dict)
    """All other tasks: which column plays which role, such as {text: sentence, label: gold}. A column that is named
    like its role needs no line here; docs/tasks.md lists the roles."""
    document: Literal["file", "paragraph", "line"] | None = None
    """What a document is in a .txt file: the whole file (when not given), each block between empty lines, or each
    line."""
    limit: PositiveInt | None = None
    """Take only the first this many documents."""

    @model_validator(mode="after")
    def _check(self) -> Source:
        exactly_one(self, "source", "path", "hub")
        only_with(self, ("config", "revision", "split"), self.hub is not None, "a hub data set")
        only_with(self, ("field", "fields"), self.source != "python-stdlib", "files or a data set with columns")
        only_with(self, ("document",), self.path is not None, "a path")
        return self


class Augmentation(Section):
    """Changed copies of the training rows of a task with labelled text, made once, by `prepare`."""

    method: Literal["synonym", "swap", "delete", "back_translation"]
    """`synonym`: words become synonyms; `swap`: pairs of words change places; `delete`: words go (Wei and Zou 2019,
    "EDA"). `back_translation`: into another language and back (Sennrich et al. 2016)."""
    copies: PositiveInt = 1
    """Copies of each row that this method adds."""
    share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """The share of the words that are changed, at least one word; 0.1 when not given."""
    unit: Literal["word", "character"] | None = None
    """What a word is: what stands between spaces (when not given), or each character, as for Chinese."""
    synonyms: Text | None = None
    """`synonym`: a text file, on each line a word and, after a tab, its synonyms with commas between."""
    forward: Text | None = None
    """`back_translation`: a local sequence-to-sequence model, or a Hub name, that translates away."""
    backward: Text | None = None
    """`back_translation`: the one that translates back."""

    @model_validator(mode="after")
    def _check(self) -> Augmentation:
        back = self.method == "back_translation"
        only_with(self, ("share", "unit"), not back, "a method that changes words")
        only_with(self, ("copies",), not back, "a method that draws at random, and a translation is always the same")
        only_with(self, ("forward", "backward"), back, "method: back_translation")
        only_with(self, ("synonyms",), self.method == "synonym", "method: synonym")
        if self.method == "synonym" and self.synonyms is None:
            raise ValueError("synonyms: the method needs a file of synonyms")
        if back and (self.forward is None or self.backward is None):
            raise ValueError("forward and backward: the method needs a model for each direction")
        return self


class DataSection(Section):
    """The documents, and how they are cut into rows."""

    train: Annotated[list[Source], Field(min_length=1)]
    """Training sources, read in this order."""
    validation: Annotated[float, Field(gt=0.0, lt=1.0)] | Annotated[list[Source], Field(min_length=1)] | None = None
    """A share of the training documents (chosen by a hash of their text), or sources of their own."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Cross-validation: cut the training rows into this many parts by a hash, each the validation side of one run."""
    fold: Annotated[int, Field(ge=0)] | None = None
    """Run only this fold, counted from 0; when not given, `ptft train` runs them all, one after the other."""
    max_length: Annotated[int, Field(ge=2, le=2**24)] = 512
    """Tokens in a row at most; a longer document goes on in the next row. What becomes of a longer row of other tasks
    is said there."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What a row that the task cannot use (a label missing, a role unknown) leads to: an end, with the first of them by
    file and line, or to being left out and counted."""
    augment: tuple[Augmentation, ...] = ()
    """Changed copies that are added to the training rows."""
    cache_dir: str | None = None
    """Where prepared data are kept; the environment variable PTFT_CACHE, else the user's cache directory, if not
    given."""
    workers: Annotated[int, Field(ge=0, le=256)] | None = None
    """Processes per rank that read ahead; 2 on an accelerator and 0 on a CPU when not given."""

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        only_with(self, ("fold",), self.folds is not None, "data.folds")
        if self.folds is not None and self.validation is not None:
            raise ValueError("folds and validation exclude each other: the folds are the validation sides")
        if self.folds is not None and self.fold is not None and self.fold >= self.folds:
            raise ValueError(f"fold: {self.fold}; with folds: {self.folds} it goes from 0 to {self.folds - 1}")
        return self
