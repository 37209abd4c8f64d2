"""data.steps: the records of all sources after cleaning, filtering and deduplication, stored in the cache.

Text steps run shard by shard (`Stage`), in several processes, and on several machines if each starts the same command.
A deduplication ends a stage: each shard is signed, one process compares the signatures of all, and the next stage reads
the records that are kept. Every directory is named by a hash of everything that affects it, and is complete when it has
its name, so that an interrupted start goes on and a later one begins where the steps differ:

    <cache>/cleaned/<fingerprint>/records.jsonl.zst   the records of a shard after a stage
                                  signatures.npy      for the deduplication that follows
                                  counts.json         what each step did
    <cache>/cleaned/<fingerprint>/                    which units of all shards are kept, see `Comparison`

Records of separate validation sources pass through the steps that change texts, and are never dropped by those that
only drop. A deduplication keeps them, and drops their copies in the training data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptft_dist.config.cleaning import ExactDedupStep, NearDedupStep
from ptft_dist.config.recipe import Recipe
from ptft_dist.config.section import Section
from ptft_dist.data.cache import HashMemo, build_each, fingerprint, writing
from ptft_dist.data.cleaning.comparison import Comparison
from ptft_dist.data.cleaning.deduplication import deduplication
from ptft_dist.data.cleaning.record_file import read_records
from ptft_dist.data.cleaning.registry import text_step
from ptft_dist.data.cleaning.stage import RECORDS, Named, Stage
from ptft_dist.data.cleaning.tally import Tally
from ptft_dist.data.encoder import Encoder, Side
from ptft_dist.data.formats import Record
from ptft_dist.data.report import StepReport
from ptft_dist.data.shards import Shard, shards_of
from ptft_dist.data.sources import fingerprint_source, unseen_column
from ptft_dist.errors import DataError
from ptft_dist.reporting.messages import progress

CLEANING_VERSION = 3
"""Part of every fingerprint. Increase it when the same steps give different records than before."""
_COUNTS = "counts.json"


@dataclass(frozen=True)
class _Output:
    """The result of a stage."""

    stage: Stage
    directories: list[Path]
    """One for each shard."""
    comparison: Comparison | None
    """Of the deduplication at the end of the stage."""


class CleanedRecords:
    """The records of a recipe with data.steps; see `Records`."""

    def __init__(self, recipe: Recipe, base: Path, cache: Path, encoder: type[Encoder], memo: HashMemo) -> None:
        """Build the steps, and hash what affects them.

        Raises:
            RecipeError: a step cannot be built, such as a custom function that does not exist.
            DataError: a file of a step is missing.
        """
        self._recipe, self._base, self._encoder, self._memo = recipe, base, encoder, memo
        self._root = cache / "cleaned"
        self._stages = list(self._split())
        self._outputs: list[_Output] = []

    def fingerprint(self) -> list[Any]:
        """Everything that affects the steps, as JSON, in their order."""
        return [named.settings for stage in self._stages for named in stage.all]

    @cached_property
    def shards(self) -> list[Shard]:
        """The shards of the sources. Raises DataError if a source is missing."""
        return shards_of(self._recipe, self._base)

    def build(self, workers: int | None = None) -> None:
        """Clean the records, unless the cache has them. Several processes share the work.

        Args:
            workers: number of processes of this one; None: see `worker_count`.

        Raises:
            DataError: a record cannot be read or stored, or a custom step failed.
            PtftError: the cache cannot be written.
        """
        if self._outputs:
            return
        outputs: list[_Output] = []
        prints = [fingerprint([CLEANING_VERSION, self._contents(shard)]) for shard in self.shards]
        for stage in self._stages:
            before = outputs[-1].comparison if outputs else None
            own = [[named.settings for named in stage.all], before.path.name if before else None]
            prints = [fingerprint([each, own]) for each in prints]
            directories = [self._root / each for each in prints]
            self._run(stage, outputs[-1] if outputs else None, directories, workers)
            if not outputs:
                self._check_columns(directories)
            comparison = self._compared(stage, directories)
            outputs.append(_Output(stage, directories, comparison))
        self._outputs = outputs

    def of(self, side: Side, index: int) -> Iterator[Record]:
        """See `Records`."""
        for number, shard in enumerate(self.shards):
            if (shard.side, shard.index) == (side, index):
                yield from self.of_shard(number)

    def of_shard(self, number: int) -> Iterator[Record]:
        """See `Records`."""
        self.build()
        return read_records(self._outputs[-1].directories[number] / RECORDS)

    # --- the report --------------------------------------------------------------------------------------------------

    def read(self) -> int:
        """Number of records in the sources."""
        self.build()
        return sum(_counts(directory)["read"] for directory in self._outputs[0].directories)

    def reports(self) -> list[StepReport]:
        """What each step did to the training and validation records together, in the order of the recipe."""
        self.build()
        reports: list[StepReport] = []
        before: Named | None = None
        for output in self._outputs:
            steps = [*([before] if before else []), *output.stage.steps]
            tallies = [Tally() for _ in steps]
            for directory in output.directories:
                counts = _counts(directory)
                given = [*([counts["deduplication"]] if before else []), *counts["steps"]]
                for tally, more in zip(tallies, given, strict=True):
                    tally.add(Tally.from_dict(more))
            for named, tally in zip(steps, tallies, strict=True):
                reports.append(tally.report(named.name, fingerprint(named.settings)))
            before = output.stage.dedup
        return reports

    # --- the stages --------------------------------------------------------------------------------------------------

    def _split(self) -> Iterator[Stage]:
        """The stages of data.steps. A deduplication ends a stage; the last stage has none."""
        roles, compared = self._recipe.settings.text_roles, self._recipe.settings.compared_roles
        steps: list[Named] = []
        for section in self._recipe.data.steps:
            settings = section.settings
            if isinstance(settings, ExactDedupStep | NearDedupStep):
                dedup = deduplication(settings)
                named = Named(section.name, dedup, _identity(settings, dedup.libraries))
                yield Stage(roles, tuple(steps), named, compared)
                steps = []
                continue
            step = text_step(settings, self._base)
            contents = step.contents(self._memo) if hasattr(step, "contents") else None
            steps.append(Named(section.name, step, _identity(settings, step.libraries, contents)))
        yield Stage(roles, tuple(steps))

    def _run(self, stage: Stage, before: _Output | None, directories: list[Path], workers: int | None) -> None:
        """Build the directories of all shards after a stage. before: the result of the stage before."""
        names = ", ".join(named.name for named in stage.all) or "keeping what is left"
        with progress(f"cleaning ({names})", unit="bytes") as shown:

            def build(number: int, unfinished: Path) -> None:
                shard = self.shards[number]
                columns: set[str] = set()
                keeping = before.comparison.kept(number) if before and before.comparison else None
                if before is None or keeping is None:
                    records = self._read(shard, columns)
                else:
                    records = keeping.of(read_records(before.directories[number] / RECORDS))
                tallies, read = stage.run(records, shard.place, unfinished, shown, workers)
                counts = {
                    "read": read,
                    "columns": sorted(columns),
                    "deduplication": keeping.tally.to_dict() if keeping else None,
                    "steps": [tally.to_dict() for tally in tallies],
                }
                with writing(unfinished):
                    (unfinished / _COUNTS).write_text(json.dumps(counts) + "\n", encoding="utf-8")

            build_each(directories, build)

    def _compared(self, stage: Stage, directories: list[Path]) -> Comparison | None:
        """Compare the signatures of a stage that ends with a deduplication."""
        if stage.dedup is None:
            return None
        sides = [shard.side for shard in self.shards]
        path = self._root / fingerprint([sides, [directory.name for directory in directories]])
        comparison = Comparison(stage.dedup.step, stage.roles, sides, directories, path)
        comparison.build()
        return comparison

    # --- the sources -------------------------------------------------------------------------------------------------

    def _contents(self, shard: Shard) -> list[Any]:
        """What identifies the records of a shard: contents, how they are read, and whether they may be dropped."""
        settings = self._recipe.settings
        return [
            fingerprint_source(shard.source, self._base, self._memo),
            list(settings.roles),
            list(settings.text_roles),
            list(settings.compared_roles),
            shard.side,
        ]

    def _read(self, shard: Shard, columns: set[str]) -> Iterator[Record]:
        """The records of a shard. columns: gets the names of the columns that they have."""
        for record in self._encoder.read(self._recipe.settings, shard.source, self._base):
            columns.update(record.values)
            yield record

    def _check_columns(self, directories: list[Path]) -> None:
        """Raises DataError if no row of a source has a column that its mapping names."""
        seen: dict[tuple[Side, int], set[str]] = {}
        for shard, directory in zip(self.shards, directories, strict=True):
            seen.setdefault((shard.side, shard.index), set()).update(_counts(directory)["columns"])
        for shard in self.shards:
            for role in shard.source.fields.keys() - seen[shard.side, shard.index]:
                raise unseen_column(shard.source, role)


def _identity(settings: Section, libraries: tuple[str, ...], contents: Any = None) -> list[Any]:
    """Everything that affects a step, as JSON. contents: of its files, which then stand for their paths."""
    own = settings.model_dump(exclude={"files"} if contents is not None else None)
    return [type(settings).__name__, own, [version(library) for library in libraries], contents]


def _counts(directory: Path) -> dict[str, Any]:
    """counts.json of a shard. Raises DataError if it is damaged."""
    try:
        counts: dict[str, Any] = json.loads((directory / _COUNTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{directory}: damaged ({error}). Delete this directory and start again.") from error
    return counts
