"""What prepared data look like, as text for the terminal and as one HTML page without scripts."""

from __future__ import annotations

from pathlib import Path

from ptft_dist.data.inspection import LANGUAGE_RECORDS, Inspection, StoreView
from ptft_dist.data.report import Sample, describe
from ptft_dist.pages.page import render
from ptft_dist.pages.tables import Table, cells, lines
from ptft_dist.reporting.output import write_text

_SHOWN_LANGUAGES = 8
_BAR = 40  # characters of the longest bar in the terminal
_SHOWN_CHARACTERS = 300  # of a row in the terminal


def text_of(inspection: Inspection) -> str:
    """The inspection for the terminal."""
    parts = [inspection.title, describe(inspection.report, from_cache=False)]
    parts += ["\n".join(lines(table)) for table in _tables(inspection)]
    for store in inspection.stores:
        most = max((count for _, _, count in store.histogram), default=1)
        bars = [
            f"  {f'{first:,} to {last:,}':>18}  {'#' * round(_BAR * count / most):<{_BAR}}  {count:,}"
            for first, last, count in store.histogram
        ]
        parts.append("\n".join([f"{store.name}: {store.unit} by length in tokens", *bars]))
    for title, samples in _step_samples(inspection):
        parts.append("\n".join([title, *(f"  {line}" for sample in samples for line in _shown(sample))]))
    for store in inspection.stores:
        rows = [f"  row {number:,}: {_short(text)}" for number, text in store.samples]
        if rows:
            parts.append("\n".join([f"{store.name}: some rows as text", *rows]))
    return "\n\n".join(parts)


def write_page(inspection: Inspection, html: Path) -> Path:
    """Write the page, and return its path. Raises PtftError if it cannot be written."""
    histograms = [
        (
            f"{store.unit.capitalize()} of {store.name}",
            [(f"{a:,} to {b:,}", count, share) for (a, b, count), share in _shares(store)],
        )
        for store in inspection.stores
    ]
    page = render(
        "data.html.jinja",
        title=inspection.title,
        report=describe(inspection.report),
        tables=_tables(inspection),
        histograms=histograms,
        steps=_step_samples(inspection),
        samples=[(store.name, store.samples) for store in inspection.stores if store.samples],
    )
    write_text(html, page)
    return html


def _shares(store: StoreView) -> list[tuple[tuple[int, int, int], float]]:
    """Each bar of a histogram with its width in percent."""
    most = max((count for _, _, count in store.histogram), default=1)
    return [(bar, round(100 * bar[2] / most, 2)) for bar in store.histogram]


def _tables(inspection: Inspection) -> list[Table]:
    report = inspection.report
    rows = []
    for store in inspection.stores:
        per_row = "-" if store.documents_per_row is None else f"{store.documents_per_row:.2f}"
        values = ", ".join(f"{name} {length:,}" for name, length in store.quantiles.items())
        lengths = f"{store.unit}: {values}"
        rows.append(cells(store.name, f"{store.rows:,}", f"{store.tokens:,}", f"{store.filled:.1%}", per_row, lengths))
    what = "packing efficiency" if report.packing else "tokens / (rows x max_length)"
    tables = [Table("Stores", ["store", "rows", "tokens", what, "documents per row", "lengths"], rows)]
    total = sum(each.tokens for each in report.sources.values()) or 1
    rows = [
        cells(
            key,
            inspection.names.get(key, ""),
            f"{each.records:,}",
            f"{each.tokens:,}",
            f"{each.tokens / total:.1%}",
            f"{each.text_bytes / 1e6:,.2f}",
            f"{each.text_bytes / max(1, each.tokens):.2f}",
        )
        for key, each in report.sources.items()
    ]
    header = ["source", "", f"{report.reads}s", "tokens", "share", "MB of text", "bytes per token"]
    tables += [Table("Sources", header, rows)] if rows else []
    rows = []
    for source, languages in inspection.languages.items():
        tokens = sum(count for _, count in languages.values()) or 1
        shown = list(languages.items())[:_SHOWN_LANGUAGES]
        text = ", ".join(f"{language} {count / tokens:.1%}" for language, (_, count) in shown)
        rows.append(cells(source, text + ", ..." * (len(languages) > len(shown))))
    note = f"Shares of the tokens of the first {LANGUAGE_RECORDS} {report.reads}s of each source."
    return [*tables, *([Table("Languages", ["source", "languages"], rows, [note])] if rows else [])]


def _step_samples(inspection: Inspection) -> list[tuple[str, list[Sample]]]:
    """A title and the examples for each kind of change or drop."""
    shown = []
    for step in inspection.report.steps:
        for reason, samples in step.samples.items():
            number = step.changed if reason == "changed" else step.dropped[reason].times
            did = "changed" if reason == "changed" else f"dropped: {reason}"
            shown.append((f"{step.name} {did} ({number:,})", samples))
    return shown


def _shown(sample: Sample) -> list[str]:
    lines = [f"{sample.where}", f"    {sample.before!r}"]
    return [*lines, f" -> {sample.after!r}"] if sample.after is not None else lines


def _short(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= _SHOWN_CHARACTERS else one_line[:_SHOWN_CHARACTERS] + "..."
