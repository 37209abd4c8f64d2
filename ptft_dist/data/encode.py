"""Documents into token stores, as a stream: read, put on a side, encode in chunks on all cores, write."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ptft_dist.config.recipe import Recipe
from ptft_dist.config.task_settings import DocumentSettings
from ptft_dist.data.cache import to_stderr
from ptft_dist.data.formats import Document
from ptft_dist.data.sides import of_train, sided
from ptft_dist.data.sources import read_documents
from ptft_dist.data.store import StoreWriter
from ptft_dist.data.tokenizer import DocumentEncoder, adds_bos, learnable
from ptft_dist.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_CHARACTERS = 2_000_000  # in one call of the tokenizer, which takes about 100 bytes for each
_CHUNKS_AHEAD = 2
_GIANT_CHARACTERS = 20_000_000
_SHOWN_EMPTY = 5

T = TypeVar("T")
SidedDocument = tuple[str, Document]
"""("train" or "validation", the document)."""


def split_documents(recipe: Recipe, base: Path) -> Iterator[SidedDocument]:
    """Every document with its side, in the recipe's order.

    Raises:
        DataError: as `read_documents`.
    """
    return sided(recipe.data, partial(read_documents, base=base), lambda document: document.text)


def training_texts(recipe: Recipe, base: Path) -> Iterator[str]:
    """The texts of the training side: what a tokenizer may learn from."""
    read = partial(read_documents, base=base)
    for document in of_train(recipe.data, read, lambda document: document.text):
        yield from learnable(document.text, document.where)


@dataclass
class Count:
    """What happened to the documents on their way into the stores."""

    read: int = 0
    empty: int = 0
    empty_at: list[str] = field(default_factory=list)
    unknown_tokens: int = 0

    @property
    def told(self) -> str:
        return f"{self.read} documents were read, {self.empty} of them empty"

    def drop(self, document: Document) -> None:
        self.empty += 1
        if len(self.empty_at) < _SHOWN_EMPTY:
            self.empty_at.append(document.where)


def write(
    recipe: Recipe, base: Path, directory: Path, tokenizer: PreTrainedTokenizerBase, *, progress: bool
) -> dict[str, Any]:
    """Encode every document into the stores `directory`/train and, if the recipe has it, `directory`/validation.

    Returns the report: for each side its documents, tokens, rows, dropped_tokens and text_bytes (validation: None if
    there is none); documents_read, documents_empty, empty_at (the first few); max_length, packing; vocabulary (number
    of tokens that the tokenizer knows) and unknown_tokens; boundaries_differ (see DocumentEncoder.disagreement).

    Raises:
        RecipeError: the tokenizer has no EOS, or no BOS although the recipe wants it.
        DataError: as `read_documents`; or a text spells a special token that the tokenizer cannot write as text; or a
            side has no document.
    """
    section = recipe.settings
    assert isinstance(section, DocumentSettings)
    encoder = DocumentEncoder(tokenizer, section.boundaries(adds_bos=adds_bos(tokenizer)))
    max_length, packing = recipe.data.max_length, section.packing
    writers = {
        side: StoreWriter(directory / side, vocab_size=encoder.vocab_size, max_length=max_length, packing=packing)
        for side in ("train", "validation")
        if side == "train" or recipe.validated
    }
    text_bytes = dict.fromkeys(writers, 0)
    count = Count()
    with text_progress(progress) as advance:
        for (side, document), ids in encoded(chunks(split_documents(recipe, base), count), encoder.encode):
            if not ids:
                count.drop(document)
                continue
            writers[side].add(ids)
            count.unknown_tokens += ids.count(encoder.unknown_id) if encoder.unknown_id is not None else 0
            size = len(document.text.encode())
            text_bytes[side] += size
            advance(size)
    written = {side: writer.close() for side, writer in writers.items()}
    check_sides(recipe, count.told, written)
    shown = ("documents", "tokens", "rows", "dropped_tokens")
    sides = {side: {k: written[side][k] for k in shown} | {"text_bytes": text_bytes[side]} for side in written}
    return {
        "train": sides["train"],
        "validation": sides.get("validation"),
        "documents_read": count.read,
        "documents_empty": count.empty,
        "empty_at": count.empty_at,
        "max_length": max_length,
        "packing": packing,
        "vocabulary": len(tokenizer),
        "unknown_tokens": count.unknown_tokens,
        "boundaries_differ": encoder.disagreement(),
    }


def chunks(documents: Iterator[SidedDocument], count: Count) -> Iterator[list[SidedDocument]]:
    """The documents that are not empty, in lists of a few MB."""
    chunk: list[SidedDocument] = []
    size = 0
    for side, document in documents:
        count.read += 1
        if not document.text.strip():
            count.drop(document)
            continue
        if len(document.text) > _GIANT_CHARACTERS:
            logging.getLogger("ptft").warning(
                "%s: this one document has %d million characters; encoding it will take some %d GB of memory. Smaller "
                "documents (document: paragraph) would not.",
                document.where,
                len(document.text) / 1e6,
                len(document.text) * 150 / 1e9,
            )
        chunk.append((side, document))
        size += len(document.text)
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encoded(
    lists: Iterator[list[SidedDocument]], encode: Callable[[list[Document]], list[T]]
) -> Iterator[tuple[SidedDocument, T]]:
    """Each document with what `encode` makes of it, such as its ids, in order. The tokenizer's threads work ahead while
    the caller reads and writes."""
    waiting: deque[tuple[list[SidedDocument], Future[list[T]]]] = deque()
    with ThreadPoolExecutor(max_workers=_CHUNKS_AHEAD) as pool:
        for chunk in lists:
            waiting.append((chunk, pool.submit(encode, [document for _, document in chunk])))
            if len(waiting) > _CHUNKS_AHEAD:
                done, ids = waiting.popleft()
                yield from zip(done, ids.result(), strict=True)
        for done, ids in waiting:
            yield from zip(done, ids.result(), strict=True)


def check_sides(recipe: Recipe, read: str, written: dict[str, dict[str, Any]]) -> None:
    """Raises DataError if nothing is left for a side. read: how much there was, and what became of it."""
    empty = [side for side, summary in written.items() if not summary["rows"]]
    if not empty:
        return
    if recipe.data.folds is not None:
        remedy = f"A fold (data.folds: {recipe.data.folds}) is cut by a hash: take fewer folds, or more data."
    elif isinstance(recipe.data.validation, float):
        smaller = "smaller documents (document: paragraph), " if isinstance(recipe.settings, DocumentSettings) else ""
        remedy = (
            f"A share (data.validation: {recipe.data.validation}) is cut by a hash of whole documents or rows. Take a "
            f"larger share, {smaller}more data, or sources of their own for validation."
        )
    else:
        remedy = "Look at the sources."
    raise DataError(f"data: nothing is left for {' and '.join(empty)}: {read}. {remedy}")


@contextmanager
def text_progress(wanted: bool) -> Iterator[Callable[[int], None]]:
    """Show how many bytes of text are done: a moving line on a terminal, else a line at the start and at the end."""
    if not wanted:
        yield lambda _: None
        return
    if sys.stderr.isatty():
        from rich import progress
        from rich.console import Console

        columns = (
            progress.SpinnerColumn(),
            progress.TextColumn("encoding"),
            progress.DownloadColumn(),
            progress.TransferSpeedColumn(),
            progress.TimeElapsedColumn(),
        )
        with progress.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task("encoding", total=None)
            yield lambda size: bar.advance(task, size)
        return

    done, started = 0, time.monotonic()

    def advance(size: int) -> None:
        nonlocal done
        done += size

    to_stderr("encoding the documents")
    yield advance
    to_stderr(f"encoded {done / 1e6:,.1f} MB of text in {time.monotonic() - started:,.1f} s")
