"""The tokenizer of a recipe, as a directory of its own with a report, for `ptft tokenizer`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ptft_dist.config.recipe import Recipe, Source
from ptft_dist.data.cache import cache_root
from ptft_dist.data.encoder import Encoder, RowError, Side
from ptft_dist.data.prepare import Job, check_fold
from ptft_dist.data.sides import side_of
from ptft_dist.data.sources import check_sources
from ptft_dist.data.tokenizer import first_megabytes, load_tokenizer, tokenizer_fingerprint
from ptft_dist.data.tokenizer_files import contents_of
from ptft_dist.data.tokenizer_measure import Compression, SideCompression, measure
from ptft_dist.errors import PtftError, RecipeError
from ptft_dist.reporting.messages import progress

MEASURED_BYTES = 20_000_000
"""Tokenizers are measured on this many bytes of each side: the same number from the beginning of each source, up to a
whole text."""

_OWN = "this tokenizer"
_SIDES: tuple[Side, ...] = ("train", "validation")


@dataclass(frozen=True)
class TokenizerReport:
    """The tokenizer of a recipe."""

    directory: Path | None
    """None: the recipe takes a tokenizer as it is, so nothing is written."""
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
    measured: dict[str, dict[Side, SideCompression]] = field(default_factory=dict)
    """Tokenizer -> side -> details. The first one is the recipe's; those of --compare follow."""
    vocabularies: dict[str, int] = field(default_factory=dict)
    """Number of tokens of each."""


def report_path(directory: Path) -> Path:
    """The report of a tokenizer's directory. It lies beside it: the directory itself has the same files as that of a
    run, so that its contents are known as the same tokenizer."""
    return directory.with_name(f"{directory.name}.report.json")


class TrainedTokenizer:
    """The tokenizer that `prepare` provides for a recipe, without the stores; and others to compare it with."""

    def __init__(self, recipe: Recipe, base: Path, encoder: type[Encoder], compare: Sequence[str] = ()) -> None:
        """Hash the sources.

        compare: directories and Hub names of other tokenizers.

        Raises:
            RecipeError: data.fold is missing, or a tokenizer cannot be loaded.
            DataError: a source is missing.
        """
        check_fold(recipe)
        check_sources(recipe, base)
        self._recipe, self._base, self._encoder = recipe, base.absolute(), encoder
        self._others = {name: load_tokenizer(name, key="--compare") for name in dict.fromkeys(compare)}
        if slow := [name for name, each in self._others.items() if not each.is_fast]:
            raise RecipeError(f"--compare: {slow[0]} has no tokenizer.json. Choose another tokenizer")
        self._job = Job(recipe, self._base, cache_root(recipe.data.cache_dir, self._base), encoder)
        self._fingerprint = self._job.tokenizers.changed_print(self._job.tokenizers.unchanged_name())
        self._others_print = [[name, tokenizer_fingerprint(each)] for name, each in self._others.items()]

    @property
    def writes(self) -> bool:
        """Whether there is something to write: the tokenizer is trained here, or changed."""
        return self._recipe.tokenizer.train is not None or self._job.tokenizers.changes() != [(), None]

    def report(self) -> TokenizerReport:
        """Measure the tokenizer, and write nothing. Raises RecipeError, DataError, PtftError: see `prepare`."""
        _, source = self._job.tokenizers.provide(None)
        return _report(self._measured(source), None, written=False)

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
            known = self._known(directory) if occupied else None
            if known is not None and known["others"] == self._others_print:
                return _report(known, directory, written=False)
            if occupied and not (directory / "tokenizer.json").is_file():
                raise self._refusal(directory)
            source = directory if known is not None else self._job.tokenizers.provide(None)[1]
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

    def _known(self, directory: Path) -> dict[str, Any] | None:
        """The values of the report of this tokenizer, if the directory has it."""
        try:
            values: dict[str, Any] = json.loads(report_path(directory).read_text(encoding="utf-8"))
            if values["fingerprint"] != self._fingerprint or values["contents"] != contents_of(directory):
                return None
            _report(values, directory, written=False)
            return values if "others" in values else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _refusal(self, directory: Path) -> RecipeError:
        return RecipeError(
            f"{directory}: already exists, and is not the tokenizer of this recipe and these data. Remove it, or "
            "choose another directory with --out"
        )

    def _measured(self, directory: Path) -> dict[str, Any]:
        """The report as JSON."""
        tokenizer = load_tokenizer(directory, trust_remote_code=self._recipe.tokenizer.trust_remote_code)
        if not tokenizer.is_fast:
            raise RecipeError("tokenizer.path: it has no tokenizer.json, so it cannot be measured. Use another one")
        special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        if extra := [str(token) for token in tokenizer.extra_special_tokens]:
            special["extra_special_tokens"] = extra  # type: ignore[assignment]
        all_of_them = {_OWN: tokenizer, **self._others}
        values: dict[str, Any] = {name: {"vocabulary": len(each)} for name, each in all_of_them.items()}
        for side in _SIDES:
            with progress(f"measuring tokenizers on the {side} texts", unit="bytes") as shown:

                def counted(item: tuple[str, str], shown: Any = shown) -> tuple[str, str]:
                    shown.advance(len(item[1].encode()))
                    return item

                found = measure(all_of_them, map(counted, self._texts(side)))
            for name in all_of_them:
                values[name][side] = None if found is None else found[name].to_dict()
        own = values.pop(_OWN)
        own |= {"special_tokens": special, "compared": values, "others": self._others_print}
        return own

    def _texts(self, side: Side) -> Iterator[tuple[str, str]]:
        """The first texts of each source of a side, with the name of the source."""
        data = self._recipe.data
        separate = isinstance(data.validation, list)
        if side == "validation" and data.validation is None and data.folds is None:
            return
        sources: Any = data.validation if side == "validation" and separate else data.train
        for index, source in enumerate(sources):
            for text in first_megabytes(self._texts_of(side, index), MEASURED_BYTES / len(sources) / 1e6):
                yield _name(source), text

    def _texts_of(self, side: Side, index: int) -> Iterator[str]:
        """The texts of the valid records of a side that are from one source of it."""
        data, settings, encoder = self._recipe.data, self._recipe.settings, self._encoder
        separate = isinstance(data.validation, list)
        for record in self._job.records.of(side if separate else "train", index):
            if not separate and side_of(data, encoder.key(record)) != side:
                continue
            try:
                encoder.check(settings, record)
            except RowError:
                continue
            yield from encoder.texts(settings, record)


def _name(source: Source) -> str:
    """What a source is called in the report."""
    return str(source.path or source.hub or source.source)


def describe(report: TokenizerReport) -> str:
    """The report as lines of text."""
    tokens = dict(report.special_tokens)
    extra = tokens.pop("extra_special_tokens", [])
    special = [f"{role.removesuffix('_token')} {token}" for role, token in tokens.items()]
    lines = [("vocabulary", f"{report.vocabulary:,} tokens"), ("special", ", ".join([*special, *extra]) or "none")]
    if report.directory is None:
        lines.append(("tokenizer", "taken as it is; nothing is written"))
    else:
        state = "" if report.written else "   (already there: same settings and data)"
        lines += [("tokenizer", f"{report.directory}{state}"), ("report", str(report_path(report.directory)))]
    return "\n".join([*(f"{name + ':':<13}{text}" for name, text in lines), *_table(report)])


def _table(report: TokenizerReport) -> list[str]:
    """A row for each group of texts and each tokenizer."""
    rows = [("texts", "MB", "tokenizer", "bytes per token", "fertility", "whole words", "unknown")]
    for side in _SIDES:
        own = report.measured[_OWN].get(side)
        if own is None:
            continue
        groups: list[tuple[str, Any]] = [(side, lambda each: each.total)]
        if len(own.sources) > 1:
            groups += [(f"  {name}", lambda each, name=name: each.sources[name]) for name in own.sources]
        groups += [(f"  language {code}", lambda each, code=code: each.languages[code]) for code in own.languages]
        for label, pick in groups:
            for index, (name, sides) in enumerate(report.measured.items()):
                each = pick(sides[side])
                shown = (label, f"{each.bytes / 1e6:,.3g}") if index == 0 else ("", "")
                rows.append((*shown, f"{Path(name).name} ({report.vocabularies[name]:,})", *_rates(each)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [
        "",
        *table,
        "fertility: tokens per word, or per character in scripts without spaces; punctuation is not counted",
    ]


def _rates(each: Compression) -> tuple[str, str, str, str]:
    unknown = f"{each.unknown_rate:.2%} ({each.unknown_tokens:,} tokens)" if each.unknown_tokens else "0"
    return f"{each.bytes_per_token:.3f}", f"{each.fertility:.3f} per {each.unit}", f"{each.whole_share:.1%}", unknown


def _report(values: dict[str, Any], directory: Path | None, *, written: bool) -> TokenizerReport:
    names = {_OWN: values, **values["compared"]}
    measured: dict[str, dict[Side, SideCompression]] = {
        name: {side: SideCompression.from_dict(each[side]) for side in _SIDES if each[side] is not None}
        for name, each in names.items()
    }
    own = measured[_OWN]
    return TokenizerReport(
        directory,
        values["vocabulary"],
        values["special_tokens"],
        own["train"].total if "train" in own else None,
        own["validation"].total if "validation" in own else None,
        written=written,
        measured=measured,
        vocabularies={name: each["vocabulary"] for name, each in names.items()},
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
