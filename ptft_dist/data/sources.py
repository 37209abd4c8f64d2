"""Sources of documents and rows: files and globs, data sets of the Hub, and the built-in data sets."""

from __future__ import annotations

import functools
import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import Any

from ptft_dist.config.places import expanded
from ptft_dist.config.recipe import Recipe, Source
from ptft_dist.data.builtin import read_builtin, stdlib_files
from ptft_dist.data.cache import HashMemo, fingerprint
from ptft_dist.data.class_labels import of_features, with_names
from ptft_dist.data.columns import as_fields, missing_columns, missing_text, proposed
from ptft_dist.data.formats import (
    KNOWN,
    Document,
    MissingColumns,
    Record,
    as_document,
    check_columns,
    file_format,
    read_file,
)
from ptft_dist.errors import DataError

__all__ = ["Document", "HashMemo", "check_sources", "fingerprint_source", "read_documents", "recipe_sources"]

_SHOWN_FILES = 5
_MOST_FILES = 10_000  # of a folder that are looked at to say what it contains


def read_documents(source: Source, base: Path) -> Iterator[Document]:
    """The documents of a source as a stream, always in the same order.

    Args:
        base: the directory where relative paths and globs start (that of the recipe).

    Raises:
        DataError: a file is missing, unreadable, empty or malformed, or a data set cannot be loaded.
    """
    field = source.field or "text"
    return (as_document(record, field, source.key) for record in _read(source, base, {"text": field}, only=True))


def read_records(source: Source, base: Path, roles: Sequence[str]) -> Iterator[Record]:
    """The rows of a source as a stream, always in the same order, with the column mapping applied.

    A column that source.fields maps to a role gets the name of the role. A table without a column of `roles` is
    refused at once. A JSON row without one is returned, and the task checks it.

    Raises:
        DataError: see `read_documents`; or no row has a column that source.fields names.
    """
    wanted = {role: source.fields.get(role, role) for role in roles}
    unseen = dict(source.fields)
    has: dict[str, Any] = {}
    for record in _read(source, base, wanted):
        has = has or record.values
        values = dict(record.values)
        for role, column in source.fields.items():
            if column in record.values:
                unseen.pop(role, None)
                values[role] = record.values[column]
                if column not in source.fields:
                    values.pop(column, None)
            elif column != role:
                values.pop(role, None)  # another column of the same name does not take its place
        yield Record(values, record.where)
    if source.only_files is None:  # other files of the source may have the column
        for role in unseen:
            raise unseen_column(source, role, list(has))


def unseen_column(source: Source, role: str, has: Sequence[str] = ()) -> DataError:
    """The error for a mapped column that no row has. has: the columns of the first row."""
    column = source.fields[role]
    others = [each for other, each in source.fields.items() if other != role]
    right = as_fields(proposed([role], [each for each in has if each not in others]), source.key)
    fields = f"; the fields are: {', '.join(map(repr, has))}" if has else ""
    return DataError(
        f"fields: {{{role}: {column}}}: no row of this source has a column {column!r}{fields}. Correct it: {right}."
    )


def _read(source: Source, base: Path, wanted: Mapping[str, str], *, only: bool = False) -> Iterator[Record]:
    """The records. wanted: role -> column; only: of documents, whose one role is `text`."""
    name: str
    columns = list(wanted.values())
    if source.source is not None:
        name, records = source.source, read_builtin(source.source)
    elif source.hub is not None:
        name, records = f"hub: {source.hub}", _read_hub(source, columns, only)
    else:
        name, records = f"path: {source.path}", _read_files(source, base, columns, only)
    try:
        yield from islice(records, source.limit)
    except MissingColumns as table:
        missing = {role: column for role, column in wanted.items() if column not in table.has}
        present = [column for column in columns if column in table.has]
        text = (
            missing_text(columns[0], table.has, source.key)
            if only
            else missing_columns(missing, table.has, present=present, key=source.key)
        )
        raise DataError(f"{table.where}: {text}") from None
    except OSError as error:  # of the network or a disk; formats.py converts errors of files that it opens
        raise DataError(
            f"{name}: the source cannot be read ({error}). Check the network or the disk, and start again."
        ) from error


def check_sources(recipe: Recipe, base: Path) -> None:
    """Check that every path of the recipe leads to readable files. Reads only names and sizes.

    Raises:
        DataError: one line per mistake, with the recipe's key, the path and the remedy.
    """
    problems: list[str] = []
    for key, source in recipe_sources(recipe):
        try:
            if source.source is not None:
                stdlib_files()
            elif source.path is not None:
                source_files(source, base)
        except DataError as error:
            problems += [f"{key}.{line}" for line in str(error).splitlines()]
    if problems:
        raise DataError("\n".join(problems))


def recipe_sources(recipe: Recipe) -> list[tuple[str, Source]]:
    """All sources of the recipe with their keys, such as `data.train[0]`."""
    named = {"data.train": recipe.data.train, "data.validation": recipe.data.validation, **recipe.old_data}
    return [
        (f"{key}[{i}]", source)
        for key, sources in named.items()
        if isinstance(sources, list)
        for i, source in enumerate(sources)
    ]


def fingerprint_source(source: Source, base: Path, memo: HashMemo) -> str:
    """A hash of the contents of a source and of the settings for reading it, but not of its path.

    Raises:
        DataError: see `read_documents`.
    """
    settings: dict[str, Any] = source.model_dump(exclude={"path", "name"}, exclude_none=True)
    if source.source is not None:
        settings["contents"] = memo.digests(stdlib_files())
    elif source.hub is not None:
        settings["contents"] = _hub_commit(source) if source.streaming else hub_dataset(source)._fingerprint
    else:
        files = source_files(source, base)
        settings["contents"] = list(zip(map(file_format, files), memo.digests(files), strict=True))
    return fingerprint(settings)


def _read_files(source: Source, base: Path, columns: Sequence[str], only: bool) -> Iterator[Record]:
    for file in source_files(source, base):
        yield from read_file(file, columns=columns, unit=source.document or "file", only=only)


def source_files(source: Source, base: Path) -> list[Path]:
    """The files of a path or glob, sorted.

    Raises:
        DataError: one line for each mistake.
    """
    assert source.path is not None
    if source.only_files is not None:
        return list(source.only_files)
    pattern = expanded(source.path)
    if (base / pattern).is_file():  # a file name may contain brackets without being a glob
        matches = [base / pattern]
    else:
        names = glob.glob(str(pattern), root_dir=base, recursive=True)  # noqa: PTH207  # Path.glob refuses absolute ones
        matches = [file for name in sorted(names) for file in _saved_files(base / name)]
    stats = {file: _stat(file) for file in matches}
    files = [file for file, stat in stats.items() if stat is None or not S_ISDIR(stat.st_mode)]
    if not files:
        raise DataError(f"path: {source.path}: {_why_nothing(source.path, matches, base)}")

    empty = [file for file in files if _is_empty(stats[file])]
    if len(empty) < len(files):  # the files that are left are the source
        files = [file for file in files if not _is_empty(stats[file])]
        if empty:
            _warn_once(f"path: {source.path}: {_skipped(empty)}")
    problems = [f"path: {file}: {problem}" for file in files if (problem := _file_problem(file, stats[file]))]
    if not problems:
        problems = _settings_without_effect(source, files)
    if len(problems) > _SHOWN_FILES:
        problems[_SHOWN_FILES:] = [f"path: {source.path}: and {len(problems) - _SHOWN_FILES} more such files"]
    if problems:
        raise DataError("\n".join(problems))
    return files


def _saved_files(path: Path) -> list[Path]:
    """The Arrow files of a directory of `datasets.save_to_disk`, in their order; any other path as it is."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return [path / file["filename"] for file in state["_data_files"]] if path.is_dir() else [path]
    except (OSError, ValueError, KeyError, TypeError):
        return [path]


def _why_nothing(pattern: str, matches: list[Path], base: Path) -> str:
    for path in matches:
        if splits := sorted(each.parent.name for each in path.glob("*/state.json")):
            return f"datasets.save_to_disk wrote the splits {', '.join(splits)} here. Name one: {path / splits[0]}"
    if matches:
        folder = matches[0]
        named = pattern if (base / expanded(pattern)).is_dir() else str(folder)
        endings = _endings(folder)
        if not endings:
            return f"this is a directory without a file that can be read. Supported are: {KNOWN}."
        globs = " or ".join(f"{named.rstrip('/')}/**/*{ending}" for ending in endings)
        return f"this is a directory. Name the files in it: {globs}"
    return f"no such file. A relative path starts at the recipe's directory, {base.absolute()}."


def _endings(folder: Path) -> list[str]:
    """The endings of the files below a folder that can be read, such as .jsonl.gz, the most frequent first."""
    files = map(Path, glob.iglob("**", root_dir=folder, recursive=True))  # noqa: PTH207
    known = Counter("".join(kind) for file in islice(files, _MOST_FILES) if (kind := file_format(file)))
    return [ending for ending, _ in known.most_common()]


def _is_empty(stat: os.stat_result | None) -> bool:
    return stat is not None and S_ISREG(stat.st_mode) and not stat.st_size


def _skipped(empty: Sequence[Path]) -> str:
    names = ", ".join(map(str, empty[:_SHOWN_FILES])) + ", ..." * (len(empty) > _SHOWN_FILES)
    return f"skipped {len(empty):,} empty file{'s' * (len(empty) > 1)}: {names}"


@functools.cache
def _warn_once(text: str) -> None:
    """Several parts of a command look for the files of a source."""
    logging.getLogger("ptft").warning(text)


def _stat(file: Path) -> os.stat_result | None:
    """The file's status; None for a broken link."""
    try:
        return file.stat()
    except OSError:
        return None


def _file_problem(file: Path, stat: os.stat_result | None) -> str | None:
    if file_format(file) is None:
        return f"unknown file type. Supported are: {KNOWN}. Rename it or narrow the glob."
    if stat is None or not S_ISREG(stat.st_mode):
        return "this is not a regular file, or a broken link. Correct or remove it."
    if not os.access(file, os.R_OK):
        return "the file cannot be read. Check its permissions."
    if not stat.st_size:
        return "the file is empty. Remove it or narrow the glob."
    return None


def _settings_without_effect(source: Source, files: list[Path]) -> list[str]:
    """`document` applies to .txt files only, and `field` to all other files."""
    formats = {kind[0] for file in files if (kind := file_format(file))}
    problems = []
    if source.document is not None and ".txt" not in formats:
        problems.append("document: has no effect here, because there is no .txt file. Remove it.")
    if source.field is not None and formats == {".txt"}:
        problems.append("field: has no effect on .txt files. Remove it.")
    return problems


def _read_hub(source: Source, columns: Sequence[str], only: bool) -> Iterator[Record]:
    dataset = hub_dataset(source)
    name = f"hub:{source.hub}[{source.split or 'train'}]"
    names = dataset.column_names or list(next(iter(dataset), {}))  # of a stream, they may be unknown
    check_columns(columns, names, name)
    classes = of_features(dataset.features)
    for number, row in enumerate(dataset.select_columns(list(columns)) if only else dataset):
        yield Record(with_names(row, classes), f"{name}#{number}")


def hub_dataset(source: Source) -> Any:
    """The data set of a source from the Hub or from the cache of `datasets`. Raises DataError."""
    assert source.hub is not None
    return _load_hub(source.hub, source.config, source.split or "train", source.revision, source.streaming)


def _hub_commit(source: Source) -> str:
    """The commit of a data set of the Hub. Raises DataError."""
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(str(source.hub), revision=source.revision).sha)
    except Exception as error:  # of the network, the Hub, or the name
        raise DataError(
            f"hub: {source.hub}: streaming: the Hub cannot be asked for its commit ({error}). Check the name and the "
            "network; without a network, set streaming: false and use ptft prefetch."
        ) from error


@functools.lru_cache(maxsize=8)
def _load_hub(name: str, config: str | None, split: str, revision: str | None, streaming: bool) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the library raises a dozen unrelated types, which all have this cause
        raise DataError(
            f"hub: {name} (config {config}, split {split}): the data set cannot be loaded. {error} Check "
            "its name, config and split, and that this machine can reach the Hub or has the data set in its cache "
            "(HF_HOME)."
        ) from error
