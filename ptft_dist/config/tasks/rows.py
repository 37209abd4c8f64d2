"""What every task's section says about its rows, whatever they are made of."""

from __future__ import annotations

from typing import ClassVar

from ptft_dist.config.section import Section


class TaskSection(Section):
    """Settings of one task, and what other rooms ask of them."""

    after_prepare: ClassVar[tuple[str, ...]] = ()
    """Settings of a task with rows that change nothing in the prepared rows: only the network, loss or evaluation."""
    evaluation_only: ClassVar[tuple[str, ...]] = ()
    """Those of them that only an evaluation looks at."""
    text_settings: ClassVar[tuple[str, ...]] = ()
    """Those that decide which texts of a row a tokenizer learns from."""
    draws: ClassVar[bool] = False
    """`prepare` draws something at random, from train.seed."""

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
