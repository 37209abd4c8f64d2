"""What every task's section says about its rows, whatever they are made of."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from ptft_dist.config.section import Section, only_with


class TaskSettings(Section):
    """Settings of one task, and what other rooms ask of them."""

    after_prepare: ClassVar[tuple[str, ...]] = ()
    """Settings of a task with rows that change nothing in the prepared rows: only the network, loss or evaluation."""
    evaluation_only: ClassVar[tuple[str, ...]] = ()
    """Those of them that only an evaluation looks at."""
    text_settings: ClassVar[tuple[str, ...]] = ()
    """Those that decide which texts of a row a tokenizer learns from."""
    distillable: ClassVar[bool] = False
    """The recipe may have a `distillation` section."""
    writes: ClassVar[bool] = False
    """`ptft generate` can ask the trained network."""
    draws: ClassVar[bool] = False
    """`prepare` draws something at random, from train.seed."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics of an evaluation, as eval.metric names them."""
        return ("loss",)

    @property
    def full_rows(self) -> bool:
        """Every row but the last has exactly data.max_length tokens."""
        return False

    @property
    def isolated(self) -> bool:
        """Several documents or conversations share a row and must not see each other."""
        return False

    @property
    def roles(self) -> tuple[str, ...]:
        """What a column of the data can be for; the columns of pretraining documents have no roles."""
        return ()

    @property
    def augmentable(self) -> bool:
        """data.augment can change the rows' texts without making their labels wrong."""
        return False

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """The roles for which a tokenizer that is learned for this task gets a token; `eos=<|im_end|>` spells it."""
        return "eos", "bos", "pad"

    @property
    def extra_special_tokens(self) -> tuple[str, ...]:
        """Further special tokens of such a tokenizer."""
        return ()

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """Words that this task adds to any tokenizer, beside tokenizer.add."""
        return ()


class DocumentSettings(TaskSettings):
    """How the documents of a pretraining task are laid out in rows."""

    packing: bool = True
    """True: documents are laid end to end and cut into rows of exactly max_length tokens. False: each document is a
    row (a longer one becomes several), padded only as far as its micro-batch needs."""
    attention: Literal["document", "across"] | None = None
    """With packing: may a token see the other documents of its row? `document` (when not given): no, exactly as if
    each document stood alone. `across`: yes."""

    @model_validator(mode="after")
    def _check_packing(self) -> Self:
        only_with(self, ("attention",), self.packing, "packing: true")
        return self

    @property
    def isolated(self) -> bool:
        """Several documents share a row and must not see each other."""
        return self.packing and self.attention != "across"

    @property
    def full_rows(self) -> bool:
        return self.packing

    @property
    def boundaries(self) -> tuple[str | None, str]:
        """The roles of the special tokens at a document's beginning and end."""
        return None, "eos"
