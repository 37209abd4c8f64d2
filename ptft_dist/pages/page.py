"""One self-contained HTML page for a run or for several: tables, and plots by plotly.js.

The page loads nothing: its Content-Security-Policy forbids it, and allows only our two scripts, by their hashes. Texts
of samples and recipes are escaped; they may be anything.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import os
import re
import shlex
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ptft_dist import __version__
from ptft_dist.config.recipe import goal_of, is_better
from ptft_dist.config.secrets import hide
from ptft_dist.data.report import Report, describe
from ptft_dist.errors import PtftError
from ptft_dist.launch.result import ENVIRONMENT
from ptft_dist.pages.charts import Chart, charts
from ptft_dist.pages.comparison import Comparison, environment_values, evaluated_text
from ptft_dist.pages.evaluation import OLDER, why_no_intervals
from ptft_dist.pages.read import METRICS, SAMPLES, RunFiles, read_run
from ptft_dist.pages.tables import Table, cells, number
from ptft_dist.reporting.messages import clock
from ptft_dist.reporting.output import write_text

REPORT = "report.html"
_FOLDER = Path(__file__).parent
_OVERRIDE = re.compile(r"[a-z]\w*(\.\w+)*=")
_FILES = (METRICS, SAMPLES, "recipe.yaml", "resolved.yaml", "data_report.json", ENVIRONMENT, "result.json", "model")


@dataclass(frozen=True)
class Text:
    """A section of preformatted text."""

    title: str
    text: str


def write_report(run_dir: Path, html: Path | None = None, *, evaluation: bool = True) -> Path:
    """Write the page of one run and return its path.

    Args:
        html: default: RUN/report.html.
        evaluation: with the confidence intervals of `ptft evaluate`.

    Raises:
        RecipeError: this is no run directory.
        DataError: the run has no metrics, or a file is damaged.
        PtftError: the page cannot be written.
    """
    run, target = read_run(run_dir, evaluation=evaluation), html or run_dir / REPORT
    table = _evaluation_table(run)
    sections: list[Table | Text] = [_metrics_table(run), *([table] if table else [])]
    sections += [_samples_table(run)] if run.samples else []
    sections += [Text("Data", _data_text(run.data_report)), _environment_table(run), Text("Recipe", _recipe(run))]
    links = [(name, _link(run_dir / name, target.parent)) for name in _FILES if (run_dir / name).exists()]
    write_text(target, _render(run.name, _verdict(run), [run], sections, links))
    return target


def _recipe(run: RunFiles) -> str:
    """recipe.yaml, and before it what the command line has replaced."""
    words = [word for word in run.environment.get("command", []) if _OVERRIDE.match(word)]
    return "".join(f"# on the command line: {word}\n" for word in words) + run.recipe


def write_comparison(comparison: Comparison, html: Path) -> None:
    """Write the page of several runs. Raises PtftError if it cannot be written."""
    title = f"Comparison of {len(comparison.runs)} runs"
    links = [
        (run.name, _link(run.path / REPORT, html.parent)) for run in comparison.runs if (run.path / REPORT).is_file()
    ]
    write_text(html, _render(title, "", comparison.runs, comparison.tables(), links))


def _render(
    title: str,
    verdict: str,
    runs: Sequence[RunFiles],
    sections: Sequence[Table | Text],
    links: Sequence[tuple[str, str]],
) -> str:
    drawn, plotly = charts(runs), _plotly()
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    by_section: dict[str, list[tuple[int, Chart]]] = {}
    for i, chart in enumerate(drawn):
        by_section.setdefault(chart.section, []).append((i, chart))
    return render(
        "page.html.jinja",
        title=title,
        verdict=verdict,
        runs=runs,
        tables=sections,
        links=links,
        charts=by_section,
        data=hide(_data(runs, drawn)),  # _data escapes <
        script=script,
        plotly=plotly,
        hashes=f"'{_sha256(plotly)}' '{_sha256(script)}'",
    )


def render(template: str, **values: Any) -> str:
    """A page from a template of this folder. All texts are escaped, and secrets masked."""
    return (
        _environment()
        .get_template(template)
        .render(
            written=f"Written by ptft {__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            style=(_FOLDER / "page.css").read_text(encoding="utf-8"),
            **values,
        )
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        finalize=lambda value: hide(value) if type(value) is str else value,  # type `Markup` is safe
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _plotly() -> str:
    """The text of plotly.min.js of the package plotly, which need not be imported for it."""
    package = importlib.util.find_spec("plotly")
    if package is None or package.origin is None:
        raise PtftError("the package plotly is not installed; its plots are part of the page: pip install plotly")
    return (Path(package.origin).parent / "package_data/plotly.min.js").read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    """The source expression of a script in a Content-Security-Policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _data(runs: Sequence[RunFiles], drawn: Sequence[Chart]) -> str:
    """The curves as JSON that can stand in a script element."""
    values = {"runs": [run.name for run in runs], "charts": [{"title": c.title, "curves": c.curves} for c in drawn]}
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _link(target: Path, folder: Path) -> str:
    """A relative URL."""
    return urllib.parse.quote(os.path.relpath(target.resolve(), folder.resolve()))


def _verdict(run: RunFiles) -> str:
    """How the run ended, in one line."""
    result = run.result
    parts = [f"{run.status} after update {run.updates:,}" + (f": {result['reason']}" if result.get("reason") else "")]
    parts += [f"{run.tokens:,} tokens"]
    if "wall_s" in result:
        parts.append(f"{clock(result['wall_s'])} since the last start")
    if "tokens_per_s" in result:
        parts.append(f"{result['tokens_per_s']:,.0f} tokens/s")
    if "peak_memory_bytes" in result:
        parts.append(f"{result['peak_memory_bytes'] / 1e9:.2f} GB peak memory")
    if best := result.get("best"):
        parts.append(
            f"best {best['metric']} {number(best['value'])} (update {best['step']:,})" + _better_before(run, best)
        )
    if "error" in result:
        parts.append(str(result["error"]))
    return " · ".join(parts)


def _better_before(run: RunFiles, best: Mapping[str, Any]) -> str:
    """Whether the network was better before the training; the best evaluation is one of trained weights."""
    step, first = run.evaluations[0] if run.evaluations else (-1, {})
    start = first.get(best["metric"]) if step == 0 else None
    larger_is_better = (run.values.get("eval.goal") or goal_of(best["metric"])) == "max"
    if start is None or not is_better(start, best["value"], larger_is_better=larger_is_better):
        return ""
    return f", {number(start)} before the training was better"


def _metrics_table(run: RunFiles) -> Table:
    """First, last and final value of each metric."""
    title, (update, final) = "Metrics", run.final
    if not run.evaluations:
        return Table(title, [], [], ["The run has not been evaluated."])
    (first_update, first), (last_update, last) = run.evaluations[0], run.evaluations[-1]
    header = ["metric", f"first (update {first_update:,})", f"last (update {last_update:,})"]
    header += [f"exported (update {update:,})"] if update != last_update else []
    rows = []
    for name in last | final:
        values = [first.get(name), last.get(name), *([final.get(name)] if update != last_update else [])]
        rows.append(cells(name, *("-" if value is None else number(value) for value in values)))
    return Table(title, header, rows)


def _evaluation_table(run: RunFiles) -> Table | None:
    evaluation = run.evaluation
    if evaluation is None:
        return None
    intervals, why = evaluation.intervals(), why_no_intervals(evaluation, run.path)
    rows = [cells(name, evaluated_text(evaluation, intervals, name)) for name in intervals | evaluation.metrics]
    notes = [f"{evaluation.rows:,} examples, judged by ptft evaluate.", *([f"No intervals: {why}"] if why else [])]
    notes += [OLDER.format(run.path)] if evaluation.older else []
    return Table("Evaluation", ["metric", "value [95 % confidence interval over examples]"], rows, notes)


def _samples_table(run: RunFiles) -> Table:
    """The samples, one column for each of their fields."""
    names = [name for name in dict.fromkeys(key for row in run.samples for key in row) if name not in ("step", "phase")]
    rows = [cells(*(_sample_text(row.get(name, "")) for name in names)) for row in run.samples]
    return Table(f"Samples of update {run.samples[0]['step']:,}", names, rows)


def _sample_text(value: Any) -> str:
    if (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    ):
        return "\n".join(f"{message['role']}: {message['content']}" for message in value)
    return value if isinstance(value, str) else number(value) if isinstance(value, int | float) else json.dumps(value)


def _data_text(report: Mapping[str, Any]) -> str:
    """The data report as lines of text; also those of old data, which lie in it under their own key."""
    old = {key: value for key, value in report.items() if isinstance(value, dict) and "reads" in value}
    try:
        parts = [describe(Report.from_dict({key: value for key, value in report.items() if key not in old}))]
        parts += [f"{key}:\n{describe(Report.from_dict(value))}" for key, value in old.items()]
    except (KeyError, TypeError):  # of another version
        return json.dumps(report, indent=1)
    return "\n\n".join(parts)


def _environment_table(run: RunFiles) -> Table:
    values = environment_values(run)
    values["command"] = shlex.join(map(str, run.environment.get("command", ())))
    values["host"] = run.environment.get("host", "")
    return Table("Environment", ["", ""], [cells(key, value) for key, value in values.items() if value])
