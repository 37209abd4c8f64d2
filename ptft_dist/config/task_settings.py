"""The base classes of the tasks' sections, with the properties of a task that other packages use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from ptft_dist.config.section import Section, only_with


class TaskSettings(Section):
    """Settings of one task."""

    after_prepare: ClassVar[tuple[str, ...]] = ()
    """Settings that affect the network, loss or evaluation, but not the prepared rows (tasks with rows)."""
    evaluation_only: ClassVar[tuple[str, ...]] = ()
    """Settings that affect evaluations only."""
    text_settings: ClassVar[tuple[str, ...]] = ()
    """Settings that affect which texts of a row a tokenizer is trained on."""
    may_change: ClassVar[tuple[str, ...]] = ()
    """Settings that may differ in a resumed run, because they do not change the updates."""
    only_rows: ClassVar[tuple[str, ...]] = ()
    """Settings that affect only the prepared rows. A resume compares them only if the rows differ."""
    not_likelihood: ClassVar[tuple[str, ...]] = ()
    """Settings that make the loss differ from minus the log-likelihood of the labels."""
    distillable: ClassVar[bool] = False
    """The recipe may have a `distillation` section."""
    writes: ClassVar[bool] = False
    """Whether `ptft generate` works with the trained network."""
    only_with_trained_tokenizer: ClassVar[tuple[str, ...]] = ()
    """Settings that have an effect only on a tokenizer that is trained here."""
    trains: ClassVar[bool] = True
    """False: the task is evaluated only."""
    texts_per_row: ClassVar[int] = 1
    """Number of texts in a row, each of up to data.max_length tokens."""
    without_dropout: ClassVar[bool] = False
    """Whether dropout is off, also in adapters, because probabilities of the same tokens are compared."""
    draws: ClassVar[bool] = False
    """Whether `prepare` uses train.seed."""

    def for_answers(self) -> Self | None:
        """The settings with which `ptft predict` reads and answers rows; None if they give no answers."""
        return self

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics of an evaluation, as eval.metric names them."""
        return ("loss",)

    def length_problems(self, max_length: int) -> Iterator[tuple[str, str]]:  # noqa: ARG002
        """Settings that are invalid for rows of data.max_length tokens: (name, problem)."""
        yield from ()

    def batch_problems(self, global_size: int | None) -> Iterator[tuple[str, str]]:  # noqa: ARG002
        """Settings that do not fit batch.global_size: (name, problem)."""
        yield from ()

    @property
    def rollout_prompts(self) -> int | None:
        """Rows of one rollout, for tasks that learn from their own responses; None: rows are learned from directly."""
        return None

    def updates_of_rollout(self, global_size: int) -> int:
        """Updates that follow one rollout."""
        raise NotImplementedError

    @property
    def full_rows(self) -> bool:
        """Whether every row except the last has exactly data.max_length tokens."""
        return False

    @property
    def isolated(self) -> bool:
        """Whether rows are packed and attention must stay within each document or conversation."""
        return False

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the column mapping (source.fields); empty for pretraining tasks."""
        return ()

    @property
    def text_roles(self) -> tuple[str, ...]:
        """The columns whose texts data.steps looks at, also inside of lists of messages."""
        return ("text",)

    @property
    def compared_roles(self) -> tuple[str, ...]:
        """The columns besides texts that make a row another one than one with equal texts, for exact_dedup."""
        return ()

    @property
    def linked_texts(self) -> str | None:
        """Why exact_dedup may not drop lines of a text that another text of the row has; None: it may."""
        return None

    @property
    def fixed_texts(self) -> str | None:
        """Why data.steps may not change the texts; None: it may."""
        return None

    @property
    def augmentable(self) -> bool:
        """Whether data.augment can change the texts without invalidating the labels."""
        return False

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Roles of the special tokens of a tokenizer trained for this task; `eos=<|im_end|>` also gives the token."""
        return "eos", "bos", "pad"

    @property
    def extra_special_tokens(self) -> tuple[str, ...]:
        """Additional special tokens of a tokenizer trained for this task."""
        return ()

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Tokens that this task adds to every tokenizer, in addition to tokenizer.add."""
        return ()


class DocumentSettings(TaskSettings):
    """Settings of pretraining tasks on documents."""

    like_inputs: ClassVar[bool] = True
    """`prepare` warns if documents have other special tokens than the tokenizer adds to a text."""

    packing: bool = True
    """true: documents are concatenated and split into rows of exactly data.max_length tokens. false: each document is a
    row (a longer one becomes several), padded to the longest row of its micro-batch."""
    attention: Literal["document", "across"] | None = None
    """With packing: `document` (default): attention stays within each document, exactly as without packing. `across`:
    tokens attend to the other documents of their row."""

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        only_with(self, ("attention",), self.packing, "packing: true")
        return self

    @property
    def isolated(self) -> bool:
        """Whether rows are packed and attention must stay within each document."""
        return self.packing and self.attention != "across"

    @property
    def full_rows(self) -> bool:
        return self.packing

    def boundaries(self, *, adds_bos: bool) -> tuple[str | None, str]:  # noqa: ARG002
        """Roles of the special tokens at the beginning (None: no token) and at the end of a document.

        adds_bos: whether the tokenizer itself begins a text with BOS.
        """
        return None, "eos"
