"""The tokenizer that `prepare` trains for a recipe, as a directory of its own with a report, for `ptft tokenizer`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ptft_dist.config.recipe import Recipe
from ptft_dist.data.cache import cache_root, fingerprint
from ptft_dist.data.chunks import CHUNK_CHARACTERS
from ptft_dist.data.encoder import Encoder, RowError, Side
from ptft_dist.data.formats import Record
from ptft_dist.data.prepare import Job, check_fold
from ptft_dist.data.sides import sided
from ptft_dist.data.sources import check_sources
from ptft_dist.data.tokenizer import first_megabytes, load_tokenizer, text_only_backend
from ptft_dist.data.tokenizer_files import contents_of
from ptft_dist.errors import PtftError, RecipeError
from ptft_dist.reporting.messages import progress

MEASURED_BYTES = 100_000_000
"""Bytes per token are measured on this many bytes from the beginning of each side, up to a whole text."""


@dataclass(frozen=True)
class Compression:
    """How many tokens the texts of one side have, special tokens not included."""

    bytes: int
    """In UTF-8."""
    tokens: int
    unknown_tokens: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)


@dataclass(frozen=True)
class TokenizerReport:
    """A tokenizer that was trained for a recipe."""

    directory: Path
    vocabulary: int
    """Number of tokens, added ones included."""
    special_tokens: dict[str, Any]
    """Role -> token, such as eos_token; special tokens without a role are in a list under extra_special_tokens."""
    train: Compression | None
    """None: no text."""
    validation: Compression | None
    """None: the recipe has no validation data."""
    written: bool
    """False: the directory had this tokenizer already."""


def report_path(directory: Path) -> Path:
    """The report of a tokenizer's directory. It lies beside it: the directory itself has the same files as that of a
    run, so that its contents are known as the same tokenizer."""
    return directory.with_name(f"{directory.name}.report.json")


class TrainedTokenizer:
    """The tokenizer that `prepare` trains for a recipe, without the stores."""

    def __init__(self, recipe: Recipe, base: Path, encoder: type[Encoder]) -> None:
        """Hash the sources.

        Raises:
            RecipeError: the recipe trains no tokenizer, or data.fold is missing.
            DataError: a source is missing.
        """
        if recipe.tokenizer.train is None:
            raise RecipeError(
                f"tokenizer.train: not set. The recipe takes the tokenizer of {recipe.tokenizer.path}, so there is "
                "none to train. Set tokenizer.train, or use that one"
            )
        check_fold(recipe)
        check_sources(recipe, base)
        self._recipe, self._base, self._encoder = recipe, base.absolute(), encoder
        self._job = Job(recipe, self._base, cache_root(recipe.data.cache_dir, self._base), encoder)
        trained = self._job.trained_fingerprint()
        self._cached = self._job.has_trained(trained)
        self._fingerprint = fingerprint([trained, *self._job.changes(), version("transformers")])

    def write(self, directory: Path) -> TokenizerReport:
        """Write the tokenizer to `directory` and its report beside it, unless they are there.

        The report is written first, and the directory is renamed when it is complete. So a directory without its report
        was not written here.

        Raises:
            RecipeError: the directory has other files.
            DataError, PtftError: see `prepare`.
        """
        report = report_path(directory)
        try:
            occupied = directory.exists() and (not directory.is_dir() or any(directory.iterdir()))
            if occupied and (known := self._known(directory)) is not None:
                return known
            if occupied and not (directory.is_dir() and self._cached):
                raise self._refusal(directory)
            _, source = self._job.provide_tokenizer(None)
            contents = contents_of(source)
            if occupied and contents_of(directory) != contents:
                raise self._refusal(directory)
            values = self._measured(source) | {"fingerprint": self._fingerprint, "contents": contents}
            directory.parent.mkdir(parents=True, exist_ok=True)
            _replace(report, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
            if not occupied:
                _copy(source, directory)
        except OSError as error:
            raise PtftError(
                f"{directory}: cannot be written: {error}. Make room, or choose another directory"
            ) from error
        return _report(values, directory, written=not occupied)

    def _known(self, directory: Path) -> TokenizerReport | None:
        """The report of this tokenizer, if the directory has it."""
        try:
            values = json.loads(report_path(directory).read_text(encoding="utf-8"))
            if values["fingerprint"] != self._fingerprint or values["contents"] != contents_of(directory):
                return None
            return _report(values, directory, written=False)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _refusal(self, directory: Path) -> RecipeError:
        return RecipeError(
            f"{directory}: already exists, and is not the tokenizer of this recipe and these data. Remove it, or "
            "choose another directory with --out"
        )

    def _measured(self, directory: Path) -> dict[str, Any]:
        tokenizer = load_tokenizer(directory)
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        if extra := [str(token) for token in tokenizer.extra_special_tokens]:
            special["extra_special_tokens"] = extra  # type: ignore[assignment]
        sides: tuple[Side, ...] = ("train", "validation")
        measured = {side: self._compression(tokenizer, side) for side in sides}
        return {
            "vocabulary": len(tokenizer),
            "special_tokens": special,
            **{
                side: None if each is None else {**asdict(each), "bytes_per_token": round(each.bytes_per_token, 4)}
                for side, each in measured.items()
            },
        }

    def _compression(self, tokenizer: Any, side: Side) -> Compression | None:
        """Bytes and tokens of the first texts of a side; None if it has none."""
        backend, unknown_id = text_only_backend(tokenizer), tokenizer.unk_token_id
        size = tokens = unknown = 0
        with progress(f"measuring the tokenizer on the {side} texts", unit="bytes") as shown:
            for batch in _batches(first_megabytes(self._texts(side), MEASURED_BYTES / 1e6)):
                encoded = [each.ids for each in backend.encode_batch_fast(batch, add_special_tokens=False)]
                length = sum(len(text.encode()) for text in batch)
                size, tokens = size + length, tokens + sum(map(len, encoded))
                unknown += 0 if unknown_id is None else sum(ids.count(unknown_id) for ids in encoded)
                shown.advance(length)
        return Compression(size, tokens, unknown) if size else None

    def _texts(self, side: Side) -> Iterator[str]:
        """The texts of the valid records of a side."""
        settings, encoder = self._recipe.settings, self._encoder
        for record in self._records(side):
            try:
                encoder.check(settings, record)
            except RowError:
                continue
            yield from encoder.texts(settings, record)

    def _records(self, side: Side) -> Iterator[Record]:
        data, records = self._recipe.data, self._job.records
        if not isinstance(data.validation, list):
            yield from (record for place, record in sided(data, records, self._encoder.key) if place.side == side)
            return
        for index in range(len(data.train if side == "train" else data.validation)):
            yield from records.of(side, index)


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Texts in groups of about CHUNK_CHARACTERS characters."""
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def describe(report: TokenizerReport) -> str:
    """The report as a few lines of text."""
    tokens = dict(report.special_tokens)
    extra = tokens.pop("extra_special_tokens", [])
    special = [f"{role.removesuffix('_token')} {token}" for role, token in tokens.items()]
    lines = [("vocabulary", f"{report.vocabulary:,} tokens"), ("special", ", ".join([*special, *extra]) or "none")]
    for side, each in (("train", report.train), ("validation", report.validation)):
        if each is not None:
            unknown = f", {each.unknown_tokens:,} unknown tokens" if each.unknown_tokens else ""
            lines.append((side, f"{each.bytes_per_token:.3f} bytes per token in {each.bytes / 1e6:,.1f} MB{unknown}"))
    state = "" if report.written else "   (already there: same settings and data)"
    lines += [("tokenizer", f"{report.directory}{state}"), ("report", str(report_path(report.directory)))]
    return "\n".join(f"{name + ':':<13}{text}" for name, text in lines)


def _report(values: dict[str, Any], directory: Path, *, written: bool) -> TokenizerReport:
    def side(name: Side) -> Compression | None:
        given = values[name]
        return None if given is None else Compression(given["bytes"], given["tokens"], given["unknown_tokens"])

    return TokenizerReport(
        directory, values["vocabulary"], values["special_tokens"], side("train"), side("validation"), written
    )


def _replace(path: Path, text: str) -> None:
    partial_path = path.with_name(f".{path.name}.partial")
    partial_path.write_text(text, encoding="utf-8")
    partial_path.replace(path)


def _copy(source: Path, target: Path) -> None:
    unfinished = target.with_name(f".{target.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a start that was killed
    shutil.copytree(source, unfinished)
    unfinished.rename(target)
