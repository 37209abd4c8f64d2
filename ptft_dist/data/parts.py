"""Stores that are encoded shard by shard and then merged, by one or several processes that run the same command.

The stores of the shards lie under `<cache>/encoded/` until the merged store is complete. Each is complete when it has
its name, so an interrupted start goes on with the shards that are missing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from ptft_dist.data.cache import build_each, writing
from ptft_dist.data.encoder import Encoder, MergingWriter
from ptft_dist.data.layout import Layout
from ptft_dist.data.report import BadRows, Notes, Report, SideReport, SourceReport
from ptft_dist.data.stream import by_side, side_report
from ptft_dist.errors import DataError

_REPORT = "report.json"


class _Merged(Exception):
    """Another process has completed the merged store."""


def build(parts: Sequence[Path], merged: Path, encode: Callable[[int, Path], Report]) -> None:
    """Encode each shard into its directory, unless it exists.

    Args:
        merged: the directory of the merged store. Once it exists, parts are removed and no longer needed.
        encode: writes the stores of the shard with this number into a directory.

    Raises:
        DataError, PtftError: see `stream.write`.
    """

    def build_part(number: int, unfinished: Path) -> None:
        if merged.exists():
            raise _Merged
        report = encode(number, unfinished)
        with writing(unfinished):
            (unfinished / _REPORT).write_text(json.dumps(report.to_dict()) + "\n", encoding="utf-8")

    try:
        build_each(parts, build_part)
    except _Merged:
        return


def merge(layout: Layout, parts: Sequence[Path], directory: Path, encoder: Encoder) -> Report:
    """Append the stores of all parts to the stores of `layout` in a directory.

    Raises:
        DataError: a part is damaged.
        PtftError: the cache cannot be written.
    """
    reports = [_read(part) for part in parts]
    stores: dict[str, SideReport] = {}
    for name, side in layout.stores.items():
        with writing(directory):
            writer = cast(MergingWriter, encoder.writer(directory / name, side))
            for part in parts:
                writer.extend(part / name)
            stores[name] = side_report(writer.close(), 0)
    sources: dict[str, SourceReport] = {}
    for report in reports:
        for source, own in report.sources.items():
            sources[source] = sources[source].plus(own) if source in sources else own
    train, validation = by_side(layout, stores)
    train = replace(train, text_bytes=sum(report.train.text_bytes for report in reports))
    if validation is not None:
        sizes = [report.validation.text_bytes for report in reports if report.validation is not None]
        validation = replace(validation, text_bytes=sum(sizes))
    bad, dropped, notes = BadRows(), Notes(), Notes()
    for report in reports:
        bad.merge(report.bad_rows)
        dropped.merge(report.dropped)
        notes.merge(report.notes)
    return replace(
        reports[0],
        read=sum(report.read for report in reports),
        train=train,
        validation=validation,
        sources=sources,
        bad_rows=bad,
        dropped=dropped.entries,
        notes=notes.entries,
        survey={key: value for report in reports for key, value in report.survey.items()},
        unknown_tokens=sum(report.unknown_tokens for report in reports),
    )


def _read(part: Path) -> Report:
    try:
        return Report.from_dict(json.loads((part / _REPORT).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{part}: damaged ({error}). Delete this directory and start again.") from error
