"""What prepared data look like: sources, languages, lengths, packing and decoded rows, for `ptft data inspect`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.cleaning.texts import texts_of
from ptft_dist.data.encoder import Encoder
from ptft_dist.data.example_store import ExampleStore
from ptft_dist.data.layout import Layout
from ptft_dist.data.prepare import Prepared
from ptft_dist.data.records import Records
from ptft_dist.data.report import Report
from ptft_dist.data.store import SUMMARY, Store, TokenStore
from ptft_dist.data.tokenizer import load_tokenizer, text_ids
from ptft_dist.errors import DataError, PtftError

LANGUAGE_RECORDS = 500
"""Languages are identified in this many records at the beginning of each source."""
_LENGTHS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class StoreView:
    """The rows of one store."""

    name: str
    rows: int
    tokens: int
    unit: str
    """What the lengths are of: `documents` of a token store with packing, otherwise `rows`."""
    histogram: list[tuple[int, int, int]]
    """First length, last length (tokens), and number of units between them, both included."""
    quantiles: dict[str, int]
    """`shortest`, `median`, `90 %`, `longest`: lengths in tokens."""
    filled: float
    """tokens / (rows x data.max_length). With packing: the packing efficiency."""
    documents_per_row: float | None
    """Of a packed token store."""
    samples: list[tuple[int, str]] = field(default_factory=list)
    """(number of a row, its text)."""


@dataclass(frozen=True)
class Inspection:
    """What prepared data look like."""

    title: str
    report: Report
    stores: list[StoreView]
    languages: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    """Source -> language -> (records, tokens), over the first LANGUAGE_RECORDS records."""
    names: dict[str, str] = field(default_factory=dict)
    """Source, such as train[0] -> its name or path."""


def is_stores(path: Path) -> bool:
    """Whether this is a directory of prepared data, or one of its stores."""
    return (path / "report.json").is_file() or (path / SUMMARY).is_file()


def stores_of(path: Path) -> list[Path]:
    """The stores of a directory of prepared data; or this one, if it is a store."""
    if (path / SUMMARY).is_file():
        return [path]
    return sorted(store.parent for store in path.glob(f"*/{SUMMARY}"))


def inspect_stores(path: Path, *, samples: int) -> Inspection:
    """Look at a directory of prepared data, or at one of its stores. Languages are not identified.

    Rows are decoded if the tokenizer that they were written with still exists.

    Raises:
        DataError: the data are damaged.
    """
    root = path.parent if (path / SUMMARY).is_file() else path
    try:
        report = Report.from_dict(json.loads((root / "report.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{root}: damaged ({error}). Delete it and run ptft prepare again.") from error
    stores = {store.name: _open(store) for store in stores_of(path)}
    tokenizer = load_tokenizer(Path(report.tokenizer)) if report.tokenizer and Path(report.tokenizer).is_dir() else None
    views = [_view(name, store, report.max_length, tokenizer, samples) for name, store in stores.items()]
    return Inspection(str(path), report, views)


def inspect_prepared(
    prepared: Prepared, recipe: Recipe, encoder: type[Encoder], records: Records, samples: int
) -> Inspection:
    """Look at the prepared data of a recipe.

    Raises:
        DataError: a source cannot be read.
    """
    tokenizer = load_tokenizer(prepared.tokenizer_path, trust_remote_code=recipe.tokenizer.trust_remote_code)
    root = prepared.train.path.parent
    stores = {name: encoder.store.open(root / name) for name in Layout.of(recipe).stores}
    views = [_view(name, store, recipe.data.max_length, tokenizer, samples) for name, store in stores.items()]
    validation = recipe.data.validation if isinstance(recipe.data.validation, list) else []
    names, languages = {}, {}
    for side, sources in (("train", recipe.data.train), ("validation", validation)):
        for index, source in enumerate(sources):
            key = f"{side}[{index}]"
            names[key] = source.name or source.path or source.hub or str(source.source)
            first = islice(records.of(side, index), LANGUAGE_RECORDS)  # type: ignore[arg-type]
            texts = ("\n".join(texts_of(record.values, recipe.settings.text_roles)) for record in first)
            languages[key] = _languages(texts, tokenizer)
    title = f"Data of the recipe for {recipe.run_dir}"
    return Inspection(title, prepared.report, views, languages, names)


def _open(path: Path) -> Store:
    try:
        return TokenStore.open(path)
    except PtftError:
        return ExampleStore.open(path)


def _languages(texts: Iterable[str], tokenizer: Any) -> dict[str, tuple[int, int]]:
    """Language -> (records, tokens)."""
    from ptft_dist.data.cleaning.language import language_of

    ids = text_ids(tokenizer)
    records: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for text in texts:
        if text.strip():
            language = language_of(text)[0]
            records[language] += 1
            tokens[language] += len(ids(text))
    return {language: (records[language], count) for language, count in tokens.most_common()}


def _view(name: str, store: Store, max_length: int, tokenizer: Any, samples: int) -> StoreView:
    rows = len(store)
    parts = [
        store.lengths(np.arange(start, min(start + _LENGTHS_AT_ONCE, rows)))
        for start in range(0, rows, _LENGTHS_AT_ONCE)
    ]
    lengths = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    filled = float(lengths.sum()) / max(1, rows * max_length)
    unit, documents = "rows", None
    if isinstance(store, TokenStore) and store.packing:
        unit, lengths, documents = "documents", store.document_lengths(), store.documents / max(1, rows)
    shown = np.unique(np.linspace(0, rows - 1, min(samples, rows)).astype(int)).tolist() if samples else []
    texts = [(number, _text(store, number, tokenizer)) for number in shown] if tokenizer is not None else []
    return StoreView(name, rows, store.tokens, unit, _histogram(lengths), _quantiles(lengths), filled, documents, texts)


def _text(store: Store, number: int, tokenizer: Any) -> str:
    row = store.row(number)
    text: str = tokenizer.decode(row.input_ids.tolist())
    others = [name for name in getattr(store, "length_columns", ()) if name != "input_ids"]  # other token ids
    return "\n-> ".join([text, *(tokenizer.decode(row.columns[name].tolist()) for name in others)])


def _quantiles(lengths: np.ndarray) -> dict[str, int]:
    if not len(lengths):
        return {}
    shares = {"shortest": 0.0, "median": 0.5, "90 %": 0.9, "longest": 1.0}
    values = np.quantile(lengths, list(shares.values()), method="higher").astype(int).tolist()
    return dict(zip(shares, values, strict=True))


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Intervals from one power of two to the next, from the shortest to the longest."""
    if not len(lengths):
        return []
    low, high = int(lengths.min()), int(lengths.max())
    powers = np.arange(low.bit_length() - 1 if low else 0, high.bit_length() + 1)
    edges = 2**powers
    counts = np.histogram(lengths, np.append(edges, np.iinfo(np.int64).max))[0]
    return [
        (max(low, int(edge)), min(high, 2 * int(edge) - 1), int(count))
        for edge, count in zip(edges, counts, strict=True)
        if edge <= high
    ]
