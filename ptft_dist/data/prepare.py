"""From a recipe to token stores on disk: everything a CPU has to do to the data, done before any process group exists.

The result lies in a cache under a fingerprint of all that decides it, so whoever asks for the same thing again, on this
machine or on another that shares the cache, gets it at once:

    <cache>/tokenizers/<fingerprint>/         a tokenizer that was learned here or came from the Hub
    <cache>/stores/<fingerprint>/train/       a token store; validation/ beside it, if the recipe has one
    <cache>/stores/<fingerprint>/report.json  what was read, dropped and written
    <cache>/hashes.json                       the hashes of source files
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.cache import HashMemo, build_once, cache_root, fingerprint, to_stderr
from ptft_dist.data.sources import Document, check_sources, fingerprint_source, read_documents
from ptft_dist.data.store import StoreWriter, TokenStore
from ptft_dist.data.tokenizer import DocumentEncoder, load_tokenizer, tokenizer_fingerprint, train_tokenizer
from ptft_dist.errors import DataError, RecipeError

PREPARE_VERSION = 1
"""Part of every fingerprint: raise it when the same input should come out differently."""

_CHUNK_CHARACTERS = 2_000_000  # in one call of the tokenizer: keeps many cores busy with about 100 MB of memory
_SHOWN_EMPTY = 5
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}


@dataclass(frozen=True)
class Prepared:
    """What `prepare` leads to."""

    tokenizer_path: Path
    """A local directory for `load_tokenizer`."""
    train: TokenStore
    validation: TokenStore | None
    fingerprint: str
    report: dict[str, Any]
    """Counts of what was read, dropped and written; see `describe`."""
    from_cache: bool
    """True if the stores were there before."""


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
    check_sources(recipe, base)
    say = to_stderr if progress else _say_nothing
    cache = cache_root(recipe.data.cache_dir, base)
    memo = HashMemo(cache / "hashes.json", say)
    contents = _contents(recipe, base, memo)

    def check_unchanged() -> None:
        if _contents(recipe, base, memo) != contents:
            raise DataError("data: a source was changed while it was being prepared. Start again.")

    tokenizer_print, tokenizer_path = _provide_tokenizer(recipe, base, cache, memo, contents, check_unchanged, say)
    store_print = fingerprint(
        {
            "version": PREPARE_VERSION,
            "contents": contents,
            "tokenizer": [tokenizer_print, version("tokenizers")],
            "rows": [recipe.data.max_length, recipe.clm.packing, recipe.clm.bos],
        }
    )
    directory = cache / "stores" / store_print

    def build(unfinished: Path) -> None:
        report = _write_stores(recipe, base, unfinished, tokenizer_path, progress)
        check_unchanged()
        report["seconds"] = round(time.monotonic() - started, 3)
        (unfinished / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    from_cache = build_once(directory, build, say=say)
    return Prepared(
        tokenizer_path=tokenizer_path,
        train=TokenStore.open(directory / "train"),
        validation=None if recipe.data.validation is None else TokenStore.open(directory / "validation"),
        fingerprint=store_print,
        report=_read_report(directory),
        from_cache=from_cache,
    )


def describe(report: dict[str, Any]) -> str:
    """A report in a few lines for people."""
    lines = []
    for name in ("train", "validation"):
        if side := report[name]:
            lines.append(
                f"{name + ':':<12}{side['documents']:,} documents, {side['text_bytes'] / 1e6:,.1f} MB of text, "
                f"{side['tokens']:,} tokens, {side['rows']:,} rows"
            )
    rows = f"up to {report['max_length']:,} tokens, {'packed' if report['packing'] else 'a document each'}"
    lines.append(f"{'rows:':<12}{rows}; {report['vocabulary']:,} tokens in the vocabulary")
    if report["documents_empty"]:
        where = ", ".join(report["empty_at"])
        lines.append(f"{'left out:':<12}{report['documents_empty']:,} empty documents ({where}, ...)")
    if remnants := sum(side["dropped_tokens"] for side in (report["train"], report["validation"]) if side):
        lines.append(f"{'left out:':<12}{remnants:,} tokens that would have been a row of their own")
    if report["unknown_tokens"]:
        lines.append(f"{'warning:':<12}{report['unknown_tokens']:,} tokens are unknown to the tokenizer")
    lines.append(f"{'prepared in:':<12} {report['seconds']:,.1f} s")
    return "\n".join(lines)


def _contents(recipe: Recipe, base: Path, memo: HashMemo) -> dict[str, Any]:
    """What is read, and on which side it lands."""
    validation = recipe.data.validation
    return {
        "train": [fingerprint_source(source, base, memo) for source in recipe.data.train],
        "validation": [fingerprint_source(source, base, memo) for source in validation]
        if isinstance(validation, list)
        else validation,
    }


def _provide_tokenizer(
    recipe: Recipe,
    base: Path,
    cache: Path,
    memo: HashMemo,
    contents: dict[str, Any],
    check_unchanged: Callable[[], None],
    say: Callable[[str], None],
) -> tuple[str, Path]:
    """The tokenizer's fingerprint and its directory, where it then is. Loads nothing that is already in the cache."""
    section = recipe.tokenizer
    if section.train is not None:
        settings = section.train
        share = contents["validation"] if isinstance(contents["validation"], float) else None
        learned_from = {"train": contents["train"], "share": share, "settings": settings.model_dump()}
        name = fingerprint({"version": PREPARE_VERSION, "tokenizers": version("tokenizers"), **learned_from})

        def build(unfinished: Path) -> None:
            say(f"learning a tokenizer of {settings.vocab_size:,} tokens from the training documents")
            texts = (document.text for _, document in _documents(recipe, base, sides=("train",)))
            train_tokenizer(settings, texts).save_pretrained(unfinished)
            check_unchanged()
    else:
        assert section.path is not None
        if (local := _local_directory(section.path, base)) is not None:
            files = sorted(path for path in local.iterdir() if path.is_file() and path.suffix not in _WEIGHTS)
            return fingerprint([[file.name for file in files], memo.digests(files)]), local
        tokenizer = load_tokenizer(section.path, revision=section.revision, trust_remote_code=section.trust_remote_code)
        name = tokenizer_fingerprint(tokenizer)

        def build(unfinished: Path) -> None:
            tokenizer.save_pretrained(unfinished)

    directory = cache / "tokenizers" / name
    build_once(directory, build, say=say)
    return name, directory


def _local_directory(path: str, base: Path) -> Path | None:
    """The directory that tokenizer.path means: beside the recipe, or else as seen from here. None: a Hub name."""
    given = Path(path).expanduser()
    for candidate in (base / given, given.absolute()):
        if candidate.is_dir():
            return candidate
    if given.is_absolute() or path.startswith(".") or path.count("/") > 1:
        raise RecipeError(
            f"tokenizer.path: there is no directory {path}, neither in {base.resolve()} nor in {Path.cwd()}."
        )
    return None


def _documents(
    recipe: Recipe, base: Path, sides: tuple[str, ...] = ("train", "validation")
) -> Iterator[tuple[str, Document]]:
    """Every document with its side, in the recipe's order."""
    validation = recipe.data.validation
    share = validation if isinstance(validation, float) else 0.0
    for source in recipe.data.train:
        for document in read_documents(source, base):
            side = "validation" if _fraction(document.text) < share else "train"
            if side in sides:
                yield side, document
    if isinstance(validation, list) and "validation" in sides:
        for source in validation:
            for document in read_documents(source, base):
                yield "validation", document


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: equal documents fall on the same side of a split."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


@dataclass
class _Count:
    """What happened to the documents on their way into the stores."""

    documents_read: int = 0
    documents_empty: int = 0
    empty_at: list[str] = field(default_factory=list)

    def empty(self, document: Document) -> None:
        self.documents_empty += 1
        if len(self.empty_at) < _SHOWN_EMPTY:
            self.empty_at.append(document.where)


def _write_stores(recipe: Recipe, base: Path, directory: Path, tokenizer_path: Path, progress: bool) -> dict[str, Any]:
    """Encode every document into `directory`/train and `directory`/validation, and return the report."""
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=recipe.tokenizer.trust_remote_code)
    encoder = DocumentEncoder(tokenizer, bos=recipe.clm.bos)
    sides = ("train",) if recipe.data.validation is None else ("train", "validation")
    max_length, packing = recipe.data.max_length, recipe.clm.packing
    writers = {
        side: StoreWriter(directory / side, vocab_size=encoder.vocab_size, max_length=max_length, packing=packing)
        for side in sides
    }
    text_bytes = dict.fromkeys(sides, 0)
    count = _Count()
    with _progress(progress) as advance:
        for chunk in _chunks(_documents(recipe, base), count):
            for (side, document), ids in zip(chunk, encoder.encode([d for _, d in chunk]), strict=True):
                if not ids:
                    count.empty(document)
                    continue
                size = len(document.text.encode())
                writers[side].add(ids)
                text_bytes[side] += size
                advance(size)
    written = {side: writer.close() for side, writer in writers.items()}
    _check_sides(recipe, count, {side: summary["documents"] for side, summary in written.items()})
    shown = ("documents", "tokens", "rows", "dropped_tokens")
    report: dict[str, Any] = {
        side: {name: written[side][name] for name in shown} | {"text_bytes": text_bytes[side]} for side in sides
    }
    return (
        {"validation": None}
        | report
        | asdict(count)
        | {
            "max_length": max_length,
            "packing": packing,
            "vocabulary": len(tokenizer),
            "unknown_tokens": encoder.unknown,
            "versions": {name: version(name) for name in ("tokenizers", "transformers")} | {"prepare": PREPARE_VERSION},
        }
    )


def _chunks(documents: Iterator[tuple[str, Document]], count: _Count) -> Iterator[list[tuple[str, Document]]]:
    """Documents that are not empty, in lists of a few MB."""
    chunk: list[tuple[str, Document]] = []
    size = 0
    for side, document in documents:
        count.documents_read += 1
        if not document.text.strip():
            count.empty(document)
            continue
        chunk.append((side, document))
        size += len(document.text)
        if size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _check_sides(recipe: Recipe, count: _Count, documents: dict[str, int]) -> None:
    """
    Raises:
        DataError: training or validation has no document.
    """
    if all(documents.values()):
        return
    empty = ", ".join(side for side, number in documents.items() if not number)
    found = f"{count.documents_read} documents were read, {count.documents_empty} of them empty"
    if isinstance(recipe.data.validation, float):
        remedy = (
            f"data.validation: {recipe.data.validation} splits by whole documents. Use a larger share, smaller "
            "documents (document: paragraph), more data, or sources of their own for validation."
        )
    else:
        remedy = "Look at the sources."
    raise DataError(f"data: nothing is left for {empty}: {found}. {remedy}")


def _read_report(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{directory}: report.json is damaged ({error}). Delete the directory and start again."
        ) from error


@contextmanager
def _progress(wanted: bool) -> Iterator[Callable[[int], None]]:
    """Show how many bytes of text are done: a moving line on a terminal, else a line at the start and one at the end."""
    done, started = 0, time.monotonic()
    if not wanted:
        yield lambda _: None
        return
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            DownloadColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TransferSpeedColumn,
        )

        columns = (
            SpinnerColumn(),
            TextColumn("encoding"),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("encoding", total=None)
            yield lambda size: bar.advance(task, size)
        return

    def advance(size: int) -> None:
        nonlocal done
        done += size

    to_stderr("encoding the documents")
    yield advance
    seconds = time.monotonic() - started
    to_stderr(f"encoded {done / 1e6:,.1f} MB of text in {seconds:,.1f} s")


def _say_nothing(line: str) -> None:
    """For processes whose neighbour tells."""
