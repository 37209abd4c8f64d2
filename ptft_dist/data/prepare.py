"""From a recipe to token stores on disk: everything a CPU has to do to the data, done before any process group exists.

The result lies in a cache under a fingerprint of all that decides it. Whoever asks for the same thing again, on this
machine or on another that shares the cache, gets it at once:

    <cache>/tokenizers/<fingerprint>/         a tokenizer that was learned here, came from the Hub, or was added to
    <cache>/stores/<fingerprint>/train/       a token or example store; validation/ beside it, if the recipe has one
    <cache>/stores/<fingerprint>/report.json  what was read, dropped and written
    <cache>/hashes.json                       the hashes of source files
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptft_dist.config.recipe import Recipe, Source
from ptft_dist.config.task_settings import DocumentSettings
from ptft_dist.data import encode, encode_rows
from ptft_dist.data.augment import augmentation_contents
from ptft_dist.data.cache import HashMemo, build_once, cache_root, fingerprint, to_stderr
from ptft_dist.data.example_store import ExampleStore
from ptft_dist.data.sources import check_sources, fingerprint_source
from ptft_dist.data.store import Store, TokenStore
from ptft_dist.data.tokenizer import load_tokenizer, tokenizer_fingerprint, train_tokenizer
from ptft_dist.errors import DataError, RecipeError
from ptft_dist.tasks.sft.chat_template import saved_template

PREPARE_VERSION = 3
"""Part of every fingerprint: raise it when the same input should come out differently."""

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


_MANY = 0.1  # a share of rows left out that is told as a warning


@dataclass(frozen=True)
class Prepared:
    """What `prepare` leads to."""

    tokenizer_path: Path
    """A local directory for `load_tokenizer`."""
    train: Store
    validation: Store | None
    fingerprint: str
    report: dict[str, Any]
    """What the writer returned when the stores were written, the seconds it took, and versions; see `describe`."""
    parts: Mapping[str, Any]
    """What the fingerprint follows from besides the recipe's keys: contents of the sources, tokenizer, libraries."""
    from_cache: bool
    """True if the stores were there before."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a survey of the training rows found, such as the labels."""
        return self.report.get("facts", {})


def _kind(recipe: Recipe) -> tuple[Any, Any]:
    """The module that writes the rows of this task, and the class that reads them."""
    if recipe.task == "mlm_nsp":
        from ptft_dist.tasks.mlm_nsp import encode as encode_pairs

        return encode_pairs, ExampleStore
    return (encode, TokenStore) if isinstance(recipe.settings, DocumentSettings) else (encode_rows, ExampleStore)


def prepare(recipe: Recipe, base: Path, *, progress: bool = True) -> Prepared:
    """Bring the recipe's data into the cache, or find them there.

    Any number of processes may ask for the same data at once: one prepares them and the others wait.

    Args:
        base: the recipe's directory, where its relative paths start.
        progress: tell on stderr what is going on.

    Raises:
        RecipeError: the tokenizer cannot be loaded or lacks a special token, or the cache directory cannot be created.
        DataError: a source is missing, malformed or empty, or a side of the split gets no documents.
    """
    started = time.monotonic()
    if recipe.data.folds is not None and recipe.data.fold is None:
        raise RecipeError(
            "data.fold: which of the folds is this? Choose one, or start the recipe with `ptft train`, outside of any "
            "launcher: it runs all folds, one after the other."
        )
    kind, store = _kind(recipe)
    base = base.absolute()  # paths in the result stay good when the process changes its directory
    cache = cache_root(recipe.data.cache_dir, base)
    try:
        job = _Job(recipe, base, cache, to_stderr if progress else _say_nothing)
    except DataError:
        check_sources(recipe, base)  # knows of every such mistake in the recipe, and by its key
        raise
    tokenizer_print, tokenizer_path = job.provide_tokenizer()
    store_print = job.store_fingerprint(tokenizer_print)
    directory = job.cache / "stores" / store_print

    def build(unfinished: Path) -> None:
        tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=recipe.tokenizer.trust_remote_code)
        report = kind.write(recipe, base, unfinished, tokenizer, progress=progress)
        job.check_unchanged()
        report["seconds"] = round(time.monotonic() - started, 3)
        report["versions"] = {"prepare": PREPARE_VERSION} | {k: version(k) for k in ("tokenizers", "transformers")}
        (unfinished / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    from_cache = build_once(directory, build, say=job.say)
    try:
        return Prepared(
            tokenizer_path=tokenizer_path,
            train=store.open(directory / "train"),
            validation=store.open(directory / "validation") if recipe.validated else None,
            fingerprint=store_print,
            parts=job.fingerprint_parts(tokenizer_print),
            report=json.loads((directory / "report.json").read_text(encoding="utf-8")),
            from_cache=from_cache,
        )
    except (DataError, OSError, ValueError) as error:
        raise DataError(f"The prepared data are damaged: {error}\nDelete {directory} and start again.") from error


def describe(report: dict[str, Any]) -> str:
    """A report in a few lines for people."""
    sides = {name: report[name] for name in ("train", "validation") if report[name]}
    unit = "documents" if "documents" in report["train"] else "examples"
    lines = [
        (name, f"{side[unit]:,} {unit}, {side['text_bytes'] / 1e6:,.1f} MB of text, {side['tokens']:,} tokens")
        for name, side in sides.items()
    ]
    cut = "packed" if report["packing"] else f"each of one {unit[:-1]}"
    counts = " + ".join(f"{side['rows']:,}" for side in sides.values())
    lines.append(("rows", f"{counts} of up to {report['max_length']:,} tokens, {cut}"))
    lines.append(("vocabulary", f"{report['vocabulary']:,} tokens"))
    if labels := report.get("facts", {}).get("labels"):
        lines.append(("labels", ", ".join(labels[:20]) + (f" and {len(labels) - 20} more" if len(labels) > 20 else "")))
    if empty := report.get("documents_empty"):
        lines.append(("left out", f"{empty:,} empty documents: {_places(empty, report['empty_at'])}"))
    if remnants := sum(side.get("dropped_tokens", 0) for side in sides.values()):
        lines.append(("left out", f"{remnants:,} x a single token that would have been a row of its own"))
    if bad := report.get("bad_rows"):
        lines.append(("left out", f"{bad:,} bad rows, as data.bad_rows: skip wants:"))
        lines += [("", place) for place in report["bad_rows_at"]]
        if bad > len(report["bad_rows_at"]):
            lines.append(("", f"and {bad - len(report['bad_rows_at']):,} more"))
    for reason, (count, places) in report.get("notes", {}).items():
        many = reason.startswith("left out") and count > _MANY * report["rows_read"]
        of = f" of {report['rows_read']:,}" if many else ""
        lines.append(("warning" if many else "note", f"{count:,}{of} rows {reason}: {_places(count, places)}"))
    if unknown := report["unknown_tokens"]:
        lines.append(("warning", f"{unknown:,} tokens stand for text that the tokenizer does not know"))
    lines.append(("prepared in", f"{report['seconds']:,.1f} s"))
    return "\n".join(f"{name + ':' if name else '':<13}{text}" for name, text in lines)


def _places(count: int, places: list[str]) -> str:
    return ", ".join(places) + ", ..." * (count > len(places))


class _Job:
    """One recipe's fingerprints, and its tokenizer."""

    def __init__(self, recipe: Recipe, base: Path, cache: Path, say: Callable[[str], None]) -> None:
        self.recipe, self.base, self.cache, self.say = recipe, base, cache, say
        self._memo = HashMemo(cache / "hashes.json", say)
        self._contents = self._fingerprint_contents()

    def store_fingerprint(self, tokenizer_print: str) -> str:
        return fingerprint(
            {
                "version": PREPARE_VERSION,
                "contents": self._contents,
                "tokenizer": [tokenizer_print, version("tokenizers")],
                "rows": self._row_settings(),
            }
        )

    def fingerprint_parts(self, tokenizer_print: str) -> dict[str, Any]:
        """The fingerprint's parts that no key of the recipe says, by the key that they belong to."""
        names = ("tokenizers", "transformers", "trl") if self.recipe.task == "sft" else ("tokenizers",)
        parts = {f"data.{side}": self._contents[side] for side in ("train", "validation")}
        libraries = {"prepare": PREPARE_VERSION} | {name: version(name) for name in names}
        parts |= {"tokenizer": tokenizer_print, "libraries": libraries}
        if self.recipe.data.augment:
            parts["data.augment.files"] = augmentation_contents(self.recipe, self.base, self._memo)
        return parts

    def _row_settings(self) -> dict[str, Any]:
        """Everything beside contents and tokenizer that decides how rows come out."""
        recipe, section = self.recipe, self.recipe.settings
        settings: dict[str, Any] = {"max_length": recipe.data.max_length}
        if isinstance(section, DocumentSettings) and recipe.task != "mlm_nsp":
            return settings | {"packing": section.packing, "boundaries": section.boundaries}
        settings |= {"task": recipe.task, "section": section.model_dump(exclude=set(section.after_prepare))}
        if recipe.task == "sft":  # which tokens are learned is the libraries' affair too
            settings["libraries"] = [version("transformers"), version("trl")]
        settings |= {"bad_rows": recipe.data.bad_rows, "seed": recipe.train.seed if section.draws else None}
        if recipe.data.augment:
            settings["seed"] = recipe.train.seed
            settings["augment"] = augmentation_contents(recipe, self.base, self._memo)
        return settings

    def provide_tokenizer(self) -> tuple[str, Path]:
        """The tokenizer's fingerprint and the directory where it then is. What the cache holds is not even loaded."""
        name, directory = self._plain_tokenizer()
        added = (*self.recipe.tokenizer.add, *self.recipe.settings.added_tokens)
        template = saved_template(self.recipe, self.base)
        if not added and template is None:
            return name, directory

        def change(target: Path) -> None:
            from tokenizers import AddedToken

            tokenizer = load_tokenizer(directory, trust_remote_code=self.recipe.tokenizer.trust_remote_code)
            known = tokenizer.get_vocab()
            if double := [word for word in self.recipe.tokenizer.add if word in known]:
                raise RecipeError(f"tokenizer.add: {double[0]!r} is a token already. Remove it.")
            if template is not None:
                tokenizer.chat_template = template
            control = str(tokenizer.chat_template or "")  # what a template spells is control, not text
            tokenizer.add_tokens([AddedToken(w, normalized=False, special=w in control) for w in added])
            tokenizer.save_pretrained(target)

        changed = fingerprint([name, added, template, version("transformers")])
        build_once(self.cache / "tokenizers" / changed, change, say=self.say)
        return changed, self.cache / "tokenizers" / changed

    def _plain_tokenizer(self) -> tuple[str, Path]:
        """As it comes from its training, its directory or the Hub."""
        section = self.recipe.tokenizer
        build: Callable[[Path], object]
        if section.train is not None:
            name, build = self._trained_fingerprint(), self._train_tokenizer
        else:
            assert section.path is not None
            if (local := _local_directory(section.path, self.base)) is not None:
                return self._directory_fingerprint(local), local
            tokenizer = load_tokenizer(
                section.path, revision=section.revision, trust_remote_code=section.trust_remote_code
            )
            name, build = tokenizer_fingerprint(tokenizer), tokenizer.save_pretrained
        directory = self.cache / "tokenizers" / name
        build_once(directory, build, say=self.say)
        # Known by its contents: learned anew from the same texts, wordpiece and unigram come out with other ids.
        files = sorted(path for path in directory.iterdir() if path.is_file())
        return fingerprint({path.name: hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}), directory

    def check_unchanged(self) -> None:
        """
        Raises:
            DataError: a source is no longer what it was at the start, so nobody knows what has been read.
        """
        if self._fingerprint_contents() != self._contents:
            raise DataError("data: a source was changed while it was being prepared. Start again.")

    def _fingerprint_contents(self) -> dict[str, Any]:
        """What is read, and on which side it lands."""

        def prints(sources: list[Source]) -> list[str]:
            return [fingerprint_source(source, self.base, self._memo) for source in sources]

        data = self.recipe.data
        validation = prints(data.validation) if isinstance(data.validation, list) else data.validation
        folds = [data.folds, data.fold] if data.folds is not None else None
        return {"train": prints(data.train), "validation": validation, "folds": folds}

    def _trained_fingerprint(self) -> str:
        assert self.recipe.tokenizer.train is not None
        validation = self._contents["validation"]
        return fingerprint(
            {
                "version": PREPARE_VERSION,
                "tokenizers": version("tokenizers"),
                "settings": self.recipe.tokenizer.train.model_dump(),
                "special": [self.recipe.settings.special_tokens, self.recipe.settings.extra_special_tokens],
                "train": self._contents["train"],
                "share": validation if isinstance(validation, float) else None,
                "folds": self._contents["folds"],
                "texts": self._text_settings(),
            }
        )

    def _text_settings(self) -> list[Any]:
        """What decides which texts a tokenizer learns from, beside the sources."""
        section = self.recipe.settings
        if isinstance(section, DocumentSettings):
            return []
        settings = section.model_dump(exclude=set(section.after_prepare))
        if self.recipe.data.bad_rows == "stop":  # or else every setting may decide which rows are usable
            settings = {key: value for key, value in settings.items() if key in section.text_settings}
        return [self.recipe.task, settings, self.recipe.data.bad_rows]

    def _directory_fingerprint(self, directory: Path) -> str:
        """Of the files beside the weights: loading the tokenizer would take seconds at every start."""
        files = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix not in _WEIGHTS)
        return fingerprint([[file.name for file in files], self._memo.digests(files)])

    def _train_tokenizer(self, directory: Path) -> None:
        settings = self.recipe.tokenizer.train
        assert settings is not None
        self.say(f"learning a tokenizer of {settings.vocab_size:,} tokens from the training texts")
        texts, rows = _kind(self.recipe)[0].training_texts(self.recipe, self.base), self.recipe.settings
        train_tokenizer(settings, texts, rows.special_tokens, rows.extra_special_tokens).save_pretrained(directory)
        self.check_unchanged()


def _local_directory(path: str, base: Path) -> Path | None:
    """The directory that tokenizer.path means: beside the recipe, or else as seen from here. None: a Hub name.

    Raises:
        RecipeError: it can only be a directory, and there is none.
    """
    given = Path(path).expanduser()
    for candidate in (base / given, given.absolute()):
        if candidate.is_dir():
            return candidate
    if given.is_absolute() or path.startswith(".") or path.count("/") > 1:
        raise RecipeError(f"tokenizer.path: there is no directory {path}, neither in {base} nor in {Path.cwd()}.")
    return None


def _say_nothing(_: str) -> None:
    """For all processes but the one that speaks for them."""
