"""Prepares a recipe's data as stores on disk: all CPU work on the data, before any process group exists.

The result is stored in a cache under a fingerprint of everything that affects it. Later runs, also on other machines
that share the cache, reuse it:

    <cache>/tokenizers/<fingerprint>/         a tokenizer that was trained here, copied from the Hub, or extended
    <cache>/stores/<fingerprint>/train/       a token or example store; validation/ beside it, if the recipe has one
    <cache>/stores/<fingerprint>/report.json  what was read, dropped and written
    <cache>/cleaned/<fingerprint>/            records after data.steps, see cleaning/pipeline.py
    <cache>/encoded/<fingerprint>/            the store of one shard, until all are merged, see parts.py
    <cache>/hashes.json                       the hashes of source files
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptft_dist.config.recipe import Recipe
from ptft_dist.data import parts, stream
from ptft_dist.data.augment import Augmentations
from ptft_dist.data.cache import build_once, cache_root, fingerprint, writing
from ptft_dist.data.encoder import Encoder, EncoderContext, Place, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.inputs import Inputs
from ptft_dist.data.layout import VALIDATION, Layout
from ptft_dist.data.mixed_store import MixedStore
from ptft_dist.data.records import Records
from ptft_dist.data.report import Report, describe
from ptft_dist.data.sides import side_of, sided
from ptft_dist.data.sources import check_sources
from ptft_dist.data.store import Store
from ptft_dist.data.tokenizer import adds_bos
from ptft_dist.data.tokenizer_provider import TokenizerProvider
from ptft_dist.errors import DataError, RecipeError

__all__ = ["PREPARE_VERSION", "Prepared", "describe", "prepare"]

PREPARE_VERSION = 5
"""Part of every fingerprint. Increase it when the same input gives different rows than before."""


@dataclass(frozen=True)
class Prepared:
    """The result of `prepare`."""

    tokenizer_path: Path
    """A local directory for `load_tokenizer`."""
    train: Store
    validation: Store | None
    fingerprint: str
    parts: Mapping[str, Any]
    """The inputs of the fingerprint besides the recipe's keys: contents of sources, tokenizer, library versions."""
    inputs: str
    """See `input_fingerprint`."""
    report: Report
    """The report of when the stores were written; see `describe`."""
    from_cache: bool
    """The stores existed before."""
    old: Mapping[str, Prepared] = field(default_factory=dict)
    """The old data of continual learning, by the key that names them; all their rows are in `train`."""

    @property
    def survey(self) -> dict[str, Any]:
        """Properties of the training records, such as the labels."""
        return self.report.survey


def prepare(
    recipe: Recipe,
    base: Path,
    encoder: type[Encoder],
    *,
    tokenizer_from: Path | None = None,
    workers: int | None = None,
) -> Prepared:
    """Prepare the recipe's data in the cache, or reuse them from there.

    Several processes may prepare the same data at the same time: one does the work and the others wait.

    Args:
        base: the recipe's directory, where its relative paths start.
        encoder: the task's encoder class.
        tokenizer_from: a directory with the tokenizer that an earlier `prepare` trained for this recipe, for example in
            another cache. It is used instead of training one. No effect if the recipe loads its tokenizer.
        workers: number of encoding processes; None: the environment variable PTFT_ENCODE_WORKERS, otherwise one per
            core.

    Raises:
        RecipeError: the tokenizer cannot be loaded or lacks a special token, or the cache directory cannot be created.
        DataError: a source is missing, malformed or empty, or a side of the split gets no documents.
        PtftError: the cache cannot be written.
    """
    started = time.monotonic()
    check_fold(recipe)
    base = base.absolute()  # so that paths in the result stay valid if the process changes its directory
    cache = cache_root(recipe.data.cache_dir, base)
    try:
        job = Job(recipe, base, cache, encoder)
    except DataError:
        check_sources(recipe, base)  # lists all such mistakes with their keys
        raise
    if job.cleaned is not None and not job.tokenizers.has_tokenizer(tokenizer_from):
        job.cleaned.build(workers)  # before the lock of the tokenizer, so that several processes share the work
    tokenizer_print, tokenizer_path = job.tokenizers.provide(tokenizer_from)
    store_print = job.store_fingerprint(tokenizer_print, tokenizer_path)
    directory, layout = cache / "stores" / store_print, Layout.of(recipe)

    def build(unfinished: Path) -> None:
        report = job.write_stores(unfinished, store_print, tokenizer_path, workers)
        job.check_unchanged()
        versions = {"prepare": PREPARE_VERSION} | {k: version(k) for k in ("tokenizers", "transformers")}
        report = replace(
            report,
            tokenizer=str(tokenizer_path),
            seconds=round(time.monotonic() - started, 3),
            versions=versions,
        )
        with writing(directory):
            (unfinished / "report.json").write_text(json.dumps(report.to_dict(), indent=1) + "\n", encoding="utf-8")

    if not directory.exists():
        if job.cleaned is not None:
            job.cleaned.build(workers)
        job.encode_parts(store_print, tokenizer_path, workers)
    from_cache = build_once(directory, build)
    job.remove_parts(store_print)
    try:
        prepared = Prepared(
            tokenizer_path=tokenizer_path,
            train=_open_train(encoder, directory, layout),
            validation=encoder.store.open(directory / VALIDATION) if layout.validated else None,
            fingerprint=store_print,
            parts=job.fingerprint_parts(tokenizer_print),
            inputs=job.inputs(),
            report=Report.from_dict(json.loads((directory / "report.json").read_text(encoding="utf-8"))),
            from_cache=from_cache,
        )
    except (DataError, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"The prepared data are damaged: {error}\nDelete {directory} and start again.") from error
    old = {}
    for key, old_recipe in _old_recipes(recipe, prepared.survey).items():
        try:
            old[key] = prepare(old_recipe, base, encoder, tokenizer_from=tokenizer_path, workers=workers)
        except DataError as error:
            raise DataError(f"{key}: {error}") from error
    with contextlib.suppress(OSError):  # only `is_prepared` needs it
        job.mark.parent.mkdir(exist_ok=True)
        partial = job.mark.with_name(f".{job.mark.name}-{os.getpid()}")
        partial.write_text(str(directory), encoding="utf-8")
        partial.replace(job.mark)
    return replace(prepared, old=old)


def _open_train(encoder: type[Encoder], directory: Path, layout: Layout) -> Store:
    """The store of the training rows; with data.mixing, those of all sources as one."""
    stores = [encoder.store.open(directory / name) for name in layout.train_names]
    return MixedStore(stores, directory / "train") if layout.by_source else stores[0]


def check_fold(recipe: Recipe) -> None:
    """Raises RecipeError if the recipe has folds, and none is chosen."""
    if recipe.data.all_folds:
        raise RecipeError(
            "data.fold: required with data.folds here. Choose a fold, or start the recipe with `ptft train` outside of "
            "a launcher, which runs all folds one after the other."
        )


def _old_recipes(recipe: Recipe, survey: Mapping[str, Any]) -> dict[str, Recipe]:
    """Key -> a recipe whose training rows are the old data of that key, with the labels of the new data.

    survey: of the new data.
    """
    settings = recipe.settings
    if "labels" in survey and "labels" in type(settings).model_fields:
        settings = settings.model_copy(update={"labels": tuple(survey["labels"])})
    alone = {"validation": None, "folds": None, "fold": None, "augment": ()}
    return {
        key: recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update={**alone, "train": sources}),
                "continual": None,
                recipe.task: settings,
            }
        )
        for key, sources in recipe.old_data.items()
    }


def input_fingerprint(recipe: Recipe, base: Path, encoder: type[Encoder]) -> str:
    """A hash of the source files of the data and of a local tokenizer, without preparing the data.

    Equal recipes with equal inputs give the same data, unless a library has changed. Files that have not changed since
    they were last hashed are not read.

    Raises:
        DataError: a source is missing.
        RecipeError: there is no such tokenizer.
    """
    return Job(recipe, base, cache_root(recipe.data.cache_dir, base), encoder).inputs()


def is_prepared(recipe: Recipe, base: Path, encoder: type[Encoder]) -> bool:
    """Whether the cache has the data of this recipe. False also if only a recipe with other keys has prepared them.

    Raises:
        DataError: a source is missing.
        RecipeError: there is no such tokenizer, or the cache directory cannot be created.
    """
    mark = Job(recipe, base, cache_root(recipe.data.cache_dir, base), encoder).mark
    return mark.is_file() and Path(mark.read_text(encoding="utf-8")).is_dir()


def records_of(recipe: Recipe, base: Path, encoder: type[Encoder]) -> Records:
    """The records of a recipe, after data.steps. Raises DataError if a source is missing."""
    return Job(recipe, base, cache_root(recipe.data.cache_dir, base), encoder).records


class Job:
    """The fingerprints, the tokenizer and the steps of one recipe."""

    def __init__(self, recipe: Recipe, base: Path, cache: Path, encoder: type[Encoder]) -> None:
        self.recipe, self.base, self.encoder, self.cache = recipe, base, encoder, cache
        self._inputs = Inputs(recipe, base, cache, encoder)
        self.tokenizers = TokenizerProvider(self._inputs, cache)
        self.records, self.cleaned = self._inputs.records, self._inputs.cleaned
        self._augment = Augmentations(recipe, base, self._usable) if recipe.data.augment else None
        self._augment_print = self._augment.fingerprint(self._inputs.memo) if self._augment else None

    def _usable(self, record: Record) -> bool:
        try:
            self.encoder.check(self.recipe.settings, record)
        except RowError:
            return False
        return True

    def encode_parts(self, name: str, tokenizer_path: Path, workers: int | None) -> None:
        """Encode each shard on its own, if there are several and the task allows it. Several processes share the work.

        name: the fingerprint of the stores.
        """
        if self._in_parts:
            parts.build(self._parts(name), self.cache / "stores" / name, self._encode_part(tokenizer_path, workers))

    def write_stores(self, directory: Path, name: str, tokenizer_path: Path, workers: int | None) -> Report:
        """Write the stores into `directory`. name: their fingerprint."""
        if self._in_parts:
            report = parts.merge(
                Layout.of(self.recipe), self._parts(name), directory, self._new_encoder(tokenizer_path, {})
            )
        else:
            survey = stream.take_survey(self.recipe, self.records, self.encoder)
            steps = [(self._augment, fingerprint(self._augment_print))] if self._augment else []
            records = sided(self.recipe.data, self.records, self.encoder.key)
            encoder = self._new_encoder(tokenizer_path, survey)
            report = stream.write(self.recipe, records, directory, encoder, steps, workers=workers)
        if self.cleaned is not None:
            report = replace(report, read=self.cleaned.read(), steps=[*self.cleaned.reports(), *report.steps])
        stream.check_sides(self.recipe, report)
        return report

    def remove_parts(self, name: str) -> None:
        """Remove the encoded shards, when the stores exist."""
        if (self.cache / "encoded").is_dir() and self._in_parts:
            for part in self._parts(name):
                shutil.rmtree(part, ignore_errors=True)

    @cached_property
    def _in_parts(self) -> bool:
        return self.encoder.mergeable and len(self.records.shards) > 1

    def _parts(self, name: str) -> list[Path]:
        """The directories of the encoded shards."""
        count = len(self.records.shards)
        return [self.cache / "encoded" / fingerprint([name, number, count]) for number in range(count)]

    def _encode_part(self, tokenizer_path: Path, workers: int | None) -> Callable[[int, Path], Report]:
        def encode(number: int, directory: Path) -> Report:
            shard, records = self.records.shards[number], self.records.of_shard(number)
            key, data = self.encoder.key, self.recipe.data
            pairs = (
                (shard.place if shard.side == "validation" else Place(side_of(data, key(r)), shard.index), r)
                for r in records
            )
            return stream.write(self.recipe, pairs, directory, self._new_encoder(tokenizer_path, {}), workers=workers)

        return encode

    def _new_encoder(self, tokenizer_path: Path, survey: Mapping[str, Any]) -> Encoder:
        return self.encoder(EncoderContext.of(self.recipe, self.tokenizers.load(tokenizer_path), survey))

    # --- fingerprints ------------------------------------------------------------------------------------------------

    def store_fingerprint(self, tokenizer_print: str, tokenizer_path: Path) -> str:
        return fingerprint(
            {
                "version": PREPARE_VERSION,
                "contents": self._inputs.contents,
                **self._inputs.cleaning,
                **({"by source": True} if Layout.of(self.recipe).by_source else {}),
                "tokenizer": [tokenizer_print, version("tokenizers")],
                "rows": self._row_settings(tokenizer_path),
            }
        )

    def fingerprint_parts(self, tokenizer_print: str) -> dict[str, Any]:
        """The inputs of the fingerprint besides the recipe's keys, by the key that they belong to."""
        names = ("tokenizers", *self.encoder.libraries)
        parts = {f"data.{side}": self._inputs.contents[side] for side in ("train", "validation")}
        libraries = {"prepare": PREPARE_VERSION} | {name: version(name) for name in names}
        parts |= {"tokenizer": tokenizer_print, "libraries": libraries}
        if self._inputs.steps is not None:
            parts["data.steps.files"] = fingerprint(self._inputs.steps)
        if self._augment is not None:
            parts["data.augment.files"] = self._augment_print
        return parts

    def _row_settings(self, tokenizer_path: Path) -> dict[str, Any]:
        """Everything besides contents and tokenizer that affects the rows."""
        settings: dict[str, Any] = {"max_length": self.recipe.data.max_length}
        settings |= self.encoder.store_settings(
            self.recipe.settings, self._inputs.common, partial(self._adds_bos, tokenizer_path)
        )
        if self.encoder.libraries:
            settings["libraries"] = [version(library) for library in self.encoder.libraries]
        if self._augment is not None:
            settings |= {"seed": self.recipe.train.seed, "augment": self._augment_print}
        return settings

    @property
    def mark(self) -> Path:
        """A file that names the directory of the stores, found without loading a tokenizer."""
        own = self.recipe.model_dump(mode="json", exclude={"run_dir", "optim", "save", "eval", "log", "batch"})
        versions = [version(name) for name in ("tokenizers", "transformers", *self.encoder.libraries)]
        return self.cache / "marks" / fingerprint([PREPARE_VERSION, versions, self.inputs(), own])

    def inputs(self) -> str:
        """See `input_fingerprint`."""
        tokenizer = self.tokenizers.local_fingerprint()
        more: list[Any] = [self._inputs.old_contents] if self._inputs.old_contents else []
        more += [self._inputs.cleaning] if self._inputs.steps is not None else []
        return fingerprint([self._inputs.contents, self._augment_print, tokenizer, *more])

    def _adds_bos(self, tokenizer_path: Path) -> bool:
        """Whether the tokenizer itself begins a text with BOS. One that is trained here does not."""
        if self.recipe.tokenizer.train is not None:
            return False
        return adds_bos(self.tokenizers.load(tokenizer_path))

    def check_unchanged(self) -> None:
        """Raises DataError if a source has changed since the start: it is unknown which version has been read."""
        self._inputs.check_unchanged()
