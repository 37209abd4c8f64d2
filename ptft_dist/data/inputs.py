"""The sources of a recipe, the steps that clean them, and the fingerprints of both."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from ptft_dist.config.recipe import Recipe, Source
from ptft_dist.data.cache import HashMemo
from ptft_dist.data.cleaning.pipeline import CLEANING_VERSION, CleanedRecords
from ptft_dist.data.encoder import Encoder
from ptft_dist.data.records import Records, SourceRecords
from ptft_dist.data.sources import fingerprint_source
from ptft_dist.errors import DataError


class Inputs:
    """What a recipe reads."""

    def __init__(self, recipe: Recipe, base: Path, cache: Path, encoder: type[Encoder]) -> None:
        """Hash the files of sources and steps.

        Raises:
            DataError: a source or a file of a step is missing.
            RecipeError: a step cannot be built.
        """
        self.recipe, self.base, self.encoder = recipe, base, encoder
        self.memo = HashMemo(cache / "hashes.json")
        self.contents = self._fingerprint_contents()
        self.old_contents = [self._prints(sources) for sources in recipe.old_data.values()]
        self.common = {"task": recipe.task, "bad_rows": recipe.data.bad_rows, "seed": recipe.train.seed}
        self.cleaned = CleanedRecords(recipe, base, cache, encoder, self.memo) if recipe.data.steps else None
        self.steps = self.cleaned.fingerprint() if self.cleaned else None
        """Everything that affects the steps, as JSON; None without steps."""

    @cached_property
    def records(self) -> Records:
        """The records that are split and encoded."""
        return self.cleaned or SourceRecords(self.recipe, self.base, self.encoder)

    @property
    def cleaning(self) -> dict[str, Any]:
        """What affects the records besides the contents of the sources."""
        return {} if self.steps is None else {"steps": [CLEANING_VERSION, self.steps]}

    @property
    def texts(self) -> dict[str, Any]:
        """Everything that decides the training texts."""
        validation = self.contents["validation"]
        return {
            "train": self.contents["train"],
            **self.cleaning,
            "share": validation if isinstance(validation, float) else None,
            "folds": self.contents["folds"],
            "texts": self.encoder.text_settings(self.recipe.settings, self.common),
        }

    def check_unchanged(self) -> None:
        """Check that the sources have not changed since the start.

        Raises:
            DataError: a source has changed, so it is unknown which version has been read.
        """
        if self._fingerprint_contents() != self.contents:
            raise DataError("data: a source was changed while it was being prepared. Start again.")

    def _fingerprint_contents(self) -> dict[str, Any]:
        """The contents of the sources, and the settings of the split."""
        data = self.recipe.data
        validation = self._prints(data.validation) if isinstance(data.validation, list) else data.validation
        folds = [data.folds, data.fold] if data.folds is not None else None
        return {"train": self._prints(data.train), "validation": validation, "folds": folds}

    def _prints(self, sources: list[Source]) -> list[str]:
        return [fingerprint_source(source, self.base, self.memo) for source in sources]
