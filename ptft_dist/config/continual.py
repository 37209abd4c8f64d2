"""The continual section of a recipe: what keeps a fine-tuned network from forgetting what it could do before."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Self

from pydantic import Field, PositiveInt, model_validator

from ptft_dist.config.data_section import Source
from ptft_dist.config.section import Positive, Section

OldData = Annotated[list[Source], Field(min_length=1)]


class EwcSettings(Section):
    """Elastic weight consolidation: parameters that matter for the old data stay near model.path.

    The penalty is strength / 2 x sum over parameters of F x (parameter - its value in model.path)^2 (Kirkpatrick et al.
    2017, equation 3). F, the diagonal of the Fisher information, is the mean over old rows of the squared gradient of
    the log-likelihood of the row's labels.
    """

    strength: Positive
    """The weight of the penalty, in the unit of the mean loss."""
    data: OldData
    """The old data: rows that model.path was trained on, of this task and with the same labels."""
    rows: PositiveInt = 256
    """Estimate F on this many rows, drawn at random; on all rows if there are fewer."""


class L2SpSettings(Section):
    """L2-SP: all trained parameters stay near model.path (Li et al. 2018).

    The penalty is strength / 2 x sum over parameters of (parameter - its value in model.path)^2. Parameters that
    model.path has no weights for, such as a new head, have none.
    """

    strength: Positive
    """The weight of the penalty, in the unit of the mean loss."""


class ReplaySettings(Section):
    """Replay: old rows are mixed into the training rows."""

    data: OldData
    """The old data: rows of this task, with the same labels."""
    weight: Annotated[float, Field(ge=0.001, le=0.999)] = 0.2
    """The fraction of old rows in each update, up to rounding to whole rows; over the whole run it is exact."""

    @property
    def shares(self) -> tuple[int, int]:
        """How many of each few rows are new and old: (4, 1) for a weight of 0.2."""
        old = Fraction(self.weight).limit_denominator(1000)
        return old.denominator - old.numerator, old.numerator


class ContinualSection(Section):
    """Continual learning: fine-tune a pretrained network on new data without forgetting the old task."""

    ewc: EwcSettings | None = None
    """A penalty on changes of parameters that matter for the old data."""
    l2_sp: L2SpSettings | None = None
    """A penalty on all changes of parameters."""
    replay: ReplaySettings | None = None
    """Old rows among the training rows."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not any((self.ewc, self.l2_sp, self.replay)):
            raise ValueError("nothing is set: set ewc, l2_sp or replay, or remove the section")
        return self

    @property
    def penalties(self) -> tuple[str, ...]:
        """The keys that add a penalty on changes of parameters."""
        return tuple(name for name in ("ewc", "l2_sp") if getattr(self, name) is not None)

    @property
    def old_data(self) -> dict[str, list[Source]]:
        """Dotted key -> the sources of old data that it names."""
        named = {"continual.ewc.data": self.ewc, "continual.replay.data": self.replay}
        return {key: section.data for key, section in named.items() if section is not None}
