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
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptft_dist.config.recipe import Recipe, Source
from ptft_dist.data import parts, stream
from ptft_dist.data.augment import Augmentations
from ptft_dist.data.cache import HashMemo, build_once, cache_root, fingerprint, writing
from ptft_dist.data.cleaning.pipeline import CLEANING_VERSION, CleanedRecords
from ptft_dist.data.encoder import Encoder, EncoderContext, Place, RowError
from ptft_dist.data.formats import Record
from ptft_dist.data.layout import VALIDATION, Layout
from ptft_dist.data.mixed_store import MixedStore
from ptft_dist.data.records import Records, SourceRecords
from ptft_dist.data.report import Report, describe
from ptft_dist.data.sides import side_of, sided
from ptft_dist.data.sources import check_sources, fingerprint_source
from ptft_dist.data.store import Store
from ptft_dist.data.tokenizer import adds_bos, first_megabytes, load_tokenizer, train_tokenizer
from ptft_dist.data.tokenizer_extension import EXTENSION_VERSION, extend
from ptft_dist.data.tokenizer_files import Pieces, TokenizerFiles, pieces_of
from ptft_dist.data.tokenizer_learning import LEARNING_VERSION
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.reporting.messages import progress, say

__all__ = ["PREPARE_VERSION", "Prepared", "describe", "prepare"]

PREPARE_VERSION = 3
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
    if job.cleaned is not None and not job.has_tokenizer(tokenizer_from):
        job.cleaned.build(workers)  # before the lock of the tokenizer, so that several processes share the work
    tokenizer_print, tokenizer_path = job.provide_tokenizer(tokenizer_from)
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
    if recipe.data.folds is not None and recipe.data.fold is None:
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
        self._memo = HashMemo(cache / "hashes.json")
        self._tokenizers = TokenizerFiles(cache / "tokenizers", self._memo)
        # Cached, because fingerprint and encoder may load the same tokenizer. Neither changes it.
        self._load = functools.cache(partial(load_tokenizer, trust_remote_code=recipe.tokenizer.trust_remote_code))
        self._contents = self._fingerprint_contents()
        self._old_contents = [self._prints(sources) for sources in recipe.old_data.values()]
        self._common = {"task": recipe.task, "bad_rows": recipe.data.bad_rows, "seed": recipe.train.seed}
        self.cleaned = CleanedRecords(recipe, base, cache, encoder, self._memo) if recipe.data.steps else None
        self._steps_print = self.cleaned.fingerprint() if self.cleaned else None
        self._augment = Augmentations(recipe, base, self._usable) if recipe.data.augment else None
        self._augment_print = self._augment.fingerprint(self._memo) if self._augment else None

    @cached_property
    def records(self) -> Records:
        """The records that are split and encoded."""
        return self.cleaned or SourceRecords(self.recipe, self.base, self.encoder)

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
        if self._in_parts:
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
        return self.encoder(EncoderContext.of(self.recipe, self._load(tokenizer_path), survey))

    # --- fingerprints ------------------------------------------------------------------------------------------------

    def store_fingerprint(self, tokenizer_print: str, tokenizer_path: Path) -> str:
        return fingerprint(
            {
                "version": PREPARE_VERSION,
                "contents": self._contents,
                **self._cleaning(),
                **({"by source": True} if Layout.of(self.recipe).by_source else {}),
                "tokenizer": [tokenizer_print, version("tokenizers")],
                "rows": self._row_settings(tokenizer_path),
            }
        )

    def fingerprint_parts(self, tokenizer_print: str) -> dict[str, Any]:
        """The inputs of the fingerprint besides the recipe's keys, by the key that they belong to."""
        names = ("tokenizers", *self.encoder.libraries)
        parts = {f"data.{side}": self._contents[side] for side in ("train", "validation")}
        libraries = {"prepare": PREPARE_VERSION} | {name: version(name) for name in names}
        parts |= {"tokenizer": tokenizer_print, "libraries": libraries}
        if self._steps_print is not None:
            parts["data.steps.files"] = fingerprint(self._steps_print)
        if self._augment is not None:
            parts["data.augment.files"] = self._augment_print
        return parts

    def _cleaning(self) -> dict[str, Any]:
        """What affects the records besides the contents of the sources."""
        return {} if self._steps_print is None else {"steps": [CLEANING_VERSION, self._steps_print]}

    def _row_settings(self, tokenizer_path: Path) -> dict[str, Any]:
        """Everything besides contents and tokenizer that affects the rows."""
        settings: dict[str, Any] = {"max_length": self.recipe.data.max_length}
        settings |= self.encoder.store_settings(
            self.recipe.settings, self._common, partial(self._adds_bos, tokenizer_path)
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
        path = self.recipe.tokenizer.path
        tokenizer = None if path is None else self._tokenizers.fingerprint_local(path, self.base)
        more: list[Any] = [self._old_contents] if self._old_contents else []
        more += [self._cleaning()] if self._steps_print is not None else []
        return fingerprint([self._contents, self._augment_print, tokenizer, *more])

    def _adds_bos(self, tokenizer_path: Path) -> bool:
        """Whether the tokenizer itself begins a text with BOS. One that is trained here does not."""
        if self.recipe.tokenizer.train is not None:
            return False
        return adds_bos(self._load(tokenizer_path))

    def check_unchanged(self) -> None:
        """Check that the sources have not changed since the start.

        Raises:
            DataError: a source has changed, so it is unknown which version has been read.
        """
        if self._fingerprint_contents() != self._contents:
            raise DataError("data: a source was changed while it was being prepared. Start again.")

    def _fingerprint_contents(self) -> dict[str, Any]:
        """The contents of the sources, and the settings of the split."""
        data = self.recipe.data
        validation = self._prints(data.validation) if isinstance(data.validation, list) else data.validation
        folds = [data.folds, data.fold] if data.folds is not None else None
        return {"train": self._prints(data.train), "validation": validation, "folds": folds}

    def _prints(self, sources: list[Source]) -> list[str]:
        return [fingerprint_source(source, self.base, self._memo) for source in sources]

    def trained_fingerprint(self) -> str:
        settings = self.recipe.tokenizer.train
        assert settings is not None
        learners = {"bpe": (), "wordpiece": (LEARNING_VERSION,), "unigram": (LEARNING_VERSION, "sentencepiece")}
        return fingerprint(
            {
                "version": PREPARE_VERSION,
                "tokenizers": version("tokenizers"),
                "learner": [each if isinstance(each, int) else version(each) for each in learners[settings.algorithm]],
                "settings": settings.model_dump(),
                "special": [self.recipe.settings.special_tokens, self.recipe.settings.extra_special_tokens],
                **self._text_prints(),
            }
        )

    def _text_prints(self) -> dict[str, Any]:
        """Everything that decides the training texts."""
        validation = self._contents["validation"]
        return {
            "train": self._contents["train"],
            **self._cleaning(),
            "share": validation if isinstance(validation, float) else None,
            "folds": self._contents["folds"],
            "texts": self.encoder.text_settings(self.recipe.settings, self._common),
        }

    # --- the tokenizer -----------------------------------------------------------------------------------------------

    def provide_tokenizer(self, given: Path | None) -> tuple[str, Path]:
        """Train or load the tokenizer; return its fingerprint and its directory. One in the cache is not loaded.

        given: the directory of a tokenizer that was trained earlier.
        """
        section, files = self.recipe.tokenizer, self._tokenizers
        if section.train is not None and given is not None:
            load_tokenizer(given)  # raises its errors here
            return files.fingerprint_of_copy(given), given.absolute()
        if section.train is not None:
            name, directory = files.build(self.trained_fingerprint(), self._train_tokenizer)
        else:
            assert section.path is not None
            name, directory = files.load(section.path, self.base, section.revision, section.trust_remote_code)
        if self.changes() == [(), None]:
            return name, directory
        changed = self._changed_print(name)
        return changed, files.build_changed(changed, partial(self._change_tokenizer, directory))

    def changes(self) -> list[Any]:
        """The tokens and the chat template that are added to the tokenizer, and what new tokens are learned from."""
        section, settings = self.recipe.tokenizer, self.recipe.settings
        template = self.encoder.tokenizer_template(settings, self.base, learned=section.train is not None)
        added = (*section.add, *settings.added_tokens)
        if section.extend is None:
            return [added, template]
        learned = [EXTENSION_VERSION, version("tokenizers"), section.extend.model_dump(), self._text_prints()]
        return [added, template, learned]

    def unchanged_name(self) -> str:
        """The fingerprint of the tokenizer before `changes`. Raises RecipeError if it cannot be loaded."""
        section = self.recipe.tokenizer
        if section.train is not None:
            return self.trained_fingerprint()
        assert section.path is not None
        return self._tokenizers.load(section.path, self.base, section.revision, section.trust_remote_code)[0]

    def has_tokenizer(self, given: Path | None) -> bool:
        """Whether no tokens need to be learned from the texts. given: see `provide_tokenizer`."""
        section = self.recipe.tokenizer
        if section.train is not None:
            return given is not None or self._tokenizers.has(self.trained_fingerprint())
        return section.extend is None or self._tokenizers.has_changed(self._changed_print(self.unchanged_name()))

    def _changed_print(self, name: str) -> str:
        return fingerprint([name, *self.changes(), version("transformers")])

    def _change_tokenizer(self, directory: Path) -> tuple[Any, Pieces]:
        """The tokenizer of a directory with the tokens and the template of `changes`, and the pieces of the tokens."""
        from tokenizers import AddedToken

        added, template, *_ = self.changes()
        before = load_tokenizer(directory, trust_remote_code=self.recipe.tokenizer.trust_remote_code)
        if (extension := self.recipe.tokenizer.extend) is None:
            tokenizer = load_tokenizer(directory, trust_remote_code=self.recipe.tokenizer.trust_remote_code)
        else:
            what = f"learning {extension.tokens:,} new tokens from the training texts"
            with self._texts(what, extension.max_megabytes) as texts:
                tokenizer = extend(before, extension, texts)
        known = tokenizer.get_vocab()
        if duplicates := [word for word in self.recipe.tokenizer.add if word in known]:
            raise RecipeError(f"tokenizer.add: {duplicates[0]!r} is already a token. Remove it.")
        if template is not None:
            tokenizer.chat_template = template
        control = str(tokenizer.chat_template or "")  # tokens that occur in the template are special tokens
        tokenizer.add_tokens([AddedToken(w, normalized=False, special=w in control) for w in added])
        return tokenizer, pieces_of(before, tokenizer)

    def _train_tokenizer(self) -> Any:
        settings, rows = self.recipe.tokenizer.train, self.recipe.settings
        assert settings is not None
        what = f"training a tokenizer of {settings.vocab_size:,} tokens on the training texts"
        with self._texts(what, None) as texts:
            return train_tokenizer(settings, texts, rows.special_tokens, rows.extra_special_tokens)

    @contextlib.contextmanager
    def _texts(self, what: str, megabytes: float | None) -> Iterator[Iterator[str]]:
        """The training texts, or the first megabytes of them, with a progress bar. Raises DataError if a source is
        changed meanwhile."""
        say(f"{what} ...")
        with progress(what, unit="bytes") as shown:

            def measured(text: str) -> str:
                shown.advance(len(text.encode()))
                return text

            texts = stream.training_texts(self.recipe, self.records, self.encoder)
            yield map(measured, first_megabytes(texts, megabytes))
        self.check_unchanged()
