"""`ptft report` and `ptft compare`: what they read, compare and write. In a browser: test_page_in_browser.py."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from page_support import write_evaluation, write_json_lines, write_run
from support import start
from test_cli import imported, ptft
from tiny import write_tiny

import ptft_dist
from ptft_dist.config import secrets
from ptft_dist.errors import DataError, PtftError, RecipeError
from ptft_dist.pages.charts import POINTS, charts
from ptft_dist.pages.comparison import Comparison
from ptft_dist.pages.read import read_run, read_runs
from ptft_dist.pages.tables import Table


class Elements(HTMLParser):
    """The elements of a page, and its text outside of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] not in ("script", "style"):
            self.text += data


def two(tmp_path: Path, **second: Any) -> list[Path]:
    return [write_run(tmp_path / "a"), write_run(tmp_path / "b", **({"lr": 0.2, "losses": (3.0, 1.5, 1.0)} | second))]


def table(comparison: Comparison, title: str) -> Table:
    return next(each for each in comparison.tables() if each.title.startswith(title))


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    values: dict[str, Any] = json.loads(found[1])
    return values


# --- the page of one run ----------------------------------------------------------------------------------------------


def test_a_page_has_every_part(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", best={"metric": "loss", "value": 2.0, "step": 2})
    write_json_lines(run / "samples.jsonl", [{"step": 2, "text": "old"}, {"step": 4, "row": 7, "text": "new"}])
    side = {"examples": 5, "rows": 5, "tokens": 50, "text_bytes": 4000}
    report = {
        "reads": "row",
        "read": 60,
        "train": side,
        "validation": None,
        "steps": [],
        "dropped": {"x": [1, ["f:3"]]},
    }
    report |= {"bad_rows": {"count": 0, "first": []}, "notes": {}, "survey": {}, "max_length": 8, "packing": False}
    (run / "data_report.json").write_text(json.dumps(report | {"vocabulary": 300, "unknown_tokens": 0}))
    written = ptft_dist.report(run)
    assert written == run / "report.html"
    assert sorted(path.name for path in run.glob(".*")) == []  # no unfinished file
    page = Elements(written.read_text())
    for part in (
        "finished after update 4: all updates done · 40 tokens · 1:01 since the last start · 100 tokens/s",
        "best loss 2 (update 2)",
        "1 row x: f:3",
        "ptft train 'a b'",
        "optim: {lr: 0.1}  # the rate",
        "new",
    ):
        assert part in page.text
    assert "old" not in page.text
    assert {"metrics.jsonl", "resolved.yaml"} <= {attributes.get("href") for _, attributes in page.elements}


@pytest.mark.parametrize(
    ("losses", "metric", "value", "worse"),
    [
        ((1.5, 2.0, 2.5), "loss", 2.0, ", 1.5 before the training was better"),
        ((3.0, 2.0, 2.5), "loss", 2.0, ""),
        ((1.0, 2.0, 2.5), "accuracy", 0.5, ", 1 before the training was better"),
        ((4.0, 2.0, 2.5), "accuracy", 0.5, ""),
    ],
)
def test_a_page_says_that_the_network_was_better_before_the_training(
    tmp_path: Path, losses: tuple[float, ...], metric: str, value: float, worse: str
) -> None:
    run = write_run(tmp_path / "run", losses=losses, best={"metric": metric, "value": value, "step": 2})
    page = ptft_dist.report(run).read_text()
    assert re.findall(rf"best {metric} {value:g} \(update 2\)(.*?)</p>", page) == [worse]


def test_losses_per_token_of_other_tokenizers_are_not_tested(tmp_path: Path) -> None:
    runs = two(tmp_path)
    for run, tokens in zip(runs, (3, 2), strict=True):
        write_evaluation(run, [1.0, 2.0, 4.0])
        rows = [
            {"row": i, "id": f"same-{i}", "values": {"loss": [x * tokens, tokens], "bits_per_byte": [x, 8]}}
            for i, x in enumerate((1.0, 2.0, 4.0))
        ]
        write_json_lines(run / "evaluation.rows.jsonl", rows)
    (tested,) = Comparison(read_runs(runs)).tests
    assert isinstance(tested, dict)
    assert set(tested) == {"bits_per_byte"}


def test_a_page_loads_nothing(tmp_path: Path) -> None:
    page = ptft_dist.report(write_run(tmp_path / "run")).read_text()
    for _, attributes in Elements(page).elements:
        assert "src" not in attributes
        assert not (attributes.get("href") or "").startswith(("http", "//"))
    assert "default-src 'none'" in page
    assert "@import" not in page
    assert "url(" not in page.split("</style>")[0]


HOSTILE = "</script></pre><script>alert(1)</script><img src=x onerror=alert(2)>{{ 7*7 }}<!--"


def test_texts_are_escaped(tmp_path: Path) -> None:
    """Samples and recipes are untrusted, and so are names of runs and metrics."""
    runs = [write_run(tmp_path / f"{i} <b onclick=x>") for i in range(2)]
    for run in runs:
        write_json_lines(run / "samples.jsonl", [{"step": 4, HOSTILE: HOSTILE, "messages": [{"role": HOSTILE}]}])
        (run / "recipe.yaml").write_text(HOSTILE)
        metrics = run / "metrics.jsonl"
        metrics.write_text(metrics.read_text().replace("eval/kl", f"eval/reward/{HOSTILE}"))
        result = json.loads((run / "result.json").read_text())
        (run / "result.json").write_text(json.dumps(result | {"error": HOSTILE, "status": "failed"}))
    pages = [ptft_dist.report(runs[0]), tmp_path / "both.html"]
    ptft_dist.compare(runs, html=pages[1])
    for path in pages:
        page = Elements(path.read_text())
        assert sum(tag == "script" for tag, _ in page.elements) == 3
        assert not [tag for tag, _ in page.elements if tag in ("img", "b")]
        assert not [attributes for _, attributes in page.elements if "onclick" in attributes or "onerror" in attributes]
        assert HOSTILE in page.text
        assert any(HOSTILE in chart["title"] for chart in data_of(path.read_text())["charts"])


def test_secrets_are_masked(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "recipe.yaml").write_text("data: hunter2&co\n")
    secrets.remember("hunter2&co", "${env:TOKEN}")
    page = ptft_dist.report(run).read_text()
    assert "hunter2" not in page
    assert "data: ${env:TOKEN}" in page


@pytest.mark.parametrize("status", [None, "stopped", "failed"])
def test_a_run_that_has_not_finished(tmp_path: Path, status: str | None) -> None:
    run = write_run(tmp_path / "run", status=status, metrics={}, metrics_step=-1)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # of a run that is writing it
    assert f"{status or 'not finished'} after update 4" in Elements(ptft_dist.report(run).read_text()).text
    assert read_run(run).final[0] == 4


def test_curves(tmp_path: Path) -> None:
    """Steps, tokens and values, sorted by what they describe. Evaluations have the tokens of their update."""
    run = write_run(tmp_path / "run", losses=(4.0, 2.0))
    found = {chart.title: chart for chart in charts([read_run(run)])}
    assert list(found) == ["loss", "accuracy", "kl", "learning rate"]
    train, judged = found["loss"].curves
    assert train == {"run": 0, "side": "train", "step": [1, 2], "tokens": [10, 20], "y": [3.0, 3.0]}
    assert judged == {"run": 0, "side": "eval", "step": [0, 2], "tokens": [0, 20], "y": [4.0, 2.0]}


def test_long_curves_keep_their_extremes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    rows = [{"step": i, "loss": float(i % 7), "tokens": i, "nan": float("nan")} for i in range(1, 30_001)]
    rows[12_345]["loss"], rows[22_222]["loss"] = 99.0, -99.0
    write_json_lines(run / "metrics.jsonl", rows)
    (chart,) = charts([read_run(run)])
    (curve,) = chart.curves
    assert len(curve["y"]) <= POINTS
    assert curve["y"][curve["step"].index(12_346)] == 99.0
    assert curve["y"][curve["step"].index(22_223)] == -99.0
    assert curve["step"] == sorted(curve["step"]) == curve["tokens"]


def test_what_cannot_be_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "fold-0")
    with pytest.raises(RecipeError, match=r"runs: no run directory.*Name the runs in it: .*fold-0"):
        ptft_dist.report(tmp_path / "runs")
    with pytest.raises(RecipeError, match="absent: no run directory"):
        ptft_dist.report(tmp_path / "absent")
    with pytest.raises(PtftError, match=r"x\.html: cannot be written: File exists"):
        ptft_dist.report(run, html=run / "recipe.yaml" / "x.html")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], "[]\n", *lines[1:]]))
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not a JSON object"):
        ptft_dist.report(run)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match=r"metrics\.jsonl: no metrics yet"):
        ptft_dist.report(run)


# --- comparisons ------------------------------------------------------------------------------------------------------


def test_final_and_best_metrics(tmp_path: Path) -> None:
    comparison = Comparison(read_runs(two(tmp_path)))
    loss, accuracy = comparison.metrics["loss"], comparison.metrics["accuracy"]
    assert [vars(each) for each in loss if each] == [
        {"final": 2.5, "update": 4, "best": 2.0, "best_update": 2},
        {"final": 1.0, "update": 4, "best": 1.0, "best_update": 4},
    ]
    assert [each.best for each in accuracy if each] == [0.5, 1.0]
    assert [comparison.goal(name) for name in comparison.metrics] == ["min", "max", None]
    rows = table(comparison, "Metrics").rows
    assert [row[0].text for row in rows] == [
        "loss (lower is better)",
        "loss, best evaluation",
        "accuracy (higher is better)",
        "accuracy, best evaluation",
        "kl",
    ]
    assert [[cell.best for cell in row[1:]] for row in rows] == [[False, True]] * 4 + [[False, False]]
    assert rows[1][1].text == "2 (update 2)"


def test_the_goal_of_a_recipe_counts(tmp_path: Path) -> None:
    runs = two(tmp_path)
    for run in runs:
        (run / "resolved.yaml").write_text("eval: {metric: kl, goal: min}")
    comparison = Comparison(read_runs(runs))
    assert comparison.goal("kl") == "min"
    assert table(comparison, "Recipes").notes == ["None."]


def test_a_damaged_recipe_is_named(tmp_path: Path) -> None:
    runs = two(tmp_path)
    (runs[1] / "resolved.yaml").write_text("task: clm\noptim: [\n")
    with pytest.raises(DataError, match=r"b/resolved\.yaml:\d+: .*; restore the file"):
        ptft_dist.compare(runs, json_file=tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_losses_of_different_tasks_are_not_compared(tmp_path: Path) -> None:
    runs = two(tmp_path)
    (runs[1] / "resolved.yaml").write_text("task: mlm")
    comparison = Comparison(read_runs(runs))
    assert [comparison.goal(name) for name in ("loss", "accuracy")] == [None, "max"]
    assert not any(cell.best for cell in table(comparison, "Metrics").rows[0])


def test_recipes_and_environments_that_differ(tmp_path: Path) -> None:
    runs = two(tmp_path)
    (runs[1] / "resolved.yaml").write_text("task: clm\noptim: {lr: 0.2}\ndata: {train: [{path: x}]}\n")
    environment = json.loads((runs[1] / "environment.json").read_text())
    (runs[1] / "environment.json").write_text(json.dumps(environment | {"world_size": 4, "packages": {"torch": "3"}}))
    comparison = Comparison(read_runs(runs))
    assert comparison.recipe_differences == {
        "optim.lr": [0.1, 0.2],
        "eval.goal": [None, "-"],
        "data.train.0.path": ["-", "x"],
    }
    assert comparison.environment_differences == {"world_size": [1, 4], "torch": ["2", "3"]}
    assert "different rows or tokens, since they differ in: data.train.0.path" in table(comparison, "Metrics").notes[0]


def test_one_run_twice_or_alone(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    with pytest.raises(RecipeError, match="at least two"):
        ptft_dist.compare([a])
    with pytest.raises(RecipeError, match="named twice"):
        ptft_dist.compare([a, b, b / "../a"])
    c = write_run(tmp_path / "other" / "a")
    assert [run.name for run in read_runs([a, c])] == [str(a), str(c)]
    assert [run.name for run in read_runs([a, b])] == ["a", "b"]


def test_runs_that_judged_the_same_examples(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    write_evaluation(a, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    write_evaluation(b, [0.5, 1.0, 2.5, 3.0, 4.5, 5.0])  # each smaller
    comparison = Comparison(read_runs([a, b]))
    (found,) = comparison.tests
    assert isinstance(found, dict)
    assert found["loss"].difference.value == pytest.approx(-4.5 / 6)
    assert found["loss"].difference.low < found["loss"].difference.value < found["loss"].difference.high < 0
    assert found["loss"].p == 2 / 2**6  # only the observed one and its mirror image are that extreme
    assert comparison.intervals[0]["loss"].value == 3.5
    values = json.loads(json.dumps(comparison.values()))
    assert values["tests"]["b"]["loss"]["p"] == 2 / 64
    assert values["metrics"]["loss"]["runs"]["b"]["final"] == 1.0
    (row,) = table(comparison, "Evaluation").rows
    assert row[-1].text == "0.031"
    assert "3.5 [" in Elements(ptft_dist.report(a).read_text()).text


def test_why_there_is_no_test(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    write_evaluation(a, [1.0, 2.0])
    notes = table(Comparison(read_runs([a, b])), "Evaluation").notes
    assert notes == [f"b: no evaluation.json; run: ptft evaluate {b}"]
    write_evaluation(b, [1.0, 2.0], rows_file=False)
    notes = table(Comparison(read_runs([a, b])), "Evaluation").notes
    assert notes == [f"b: no evaluation.rows.jsonl; run: ptft evaluate {b}"]
    write_evaluation(b, [1.0, 2.0], judged="other")
    (note,) = table(Comparison(read_runs([a, b])), "Evaluation").notes
    assert note.startswith("b: no test, other examples than the first run; run for both: ptft evaluate RUN --data")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"id": "x", "values": {"loss": [1]}}\n', r"rows\.jsonl:3: not an example"),
        ('{"id": "x", "values": {"loss": [1, null]}}\n', r"rows\.jsonl:3: not an example"),
        ('{"values": {}}\n', r"rows\.jsonl:3: not an example"),
        (
            '{"id": "x", "values": {"loss": [1, 1]}}\n',
            r"rows\.jsonl: 3 examples, but evaluation\.json has 2; run again",
        ),
    ],
)
def test_damaged_evaluations(tmp_path: Path, line: str, says: str) -> None:
    run = write_run(tmp_path / "run")
    write_evaluation(run, [1.0, 2.0])
    with (run / "evaluation.rows.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match=says):
        ptft_dist.report(run)


def test_an_evaluation_of_earlier_weights(tmp_path: Path) -> None:
    a, b = two(tmp_path)
    for run in (a, b):
        write_evaluation(run, [1.0, 2.0])
    before = (a / "result.json").stat().st_mtime - 3600
    os.utime(a / "evaluation.json", (before, before))
    says = "evaluation.json is older than the last training of this run"
    notes = [note for note in table(Comparison(read_runs([a, b])), "Evaluation").notes if says in note]
    assert [note.split(":")[0] for note in notes] == ["a"]
    assert says in ptft_dist.report(a).read_text()
    assert says not in ptft_dist.report(b).read_text()


# --- the verbs, and the end of a run ----------------------------------------------------------------------------------


def test_the_verbs(tmp_path: Path) -> None:
    two(tmp_path)
    done = ptft(tmp_path, "compare", "a", "b", "--html", "x.html", "--json", "x.json")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["optim.lr", "0.1", "0.2"] in lines
    assert ["loss", "(lower", "is", "better)", "2.5", "1", "*"] in lines
    assert set(json.loads((tmp_path / "x.json").read_text())["recipe"]) == {"optim.lr"}
    assert len(data_of((tmp_path / "x.html").read_text())["runs"]) == 2
    done = ptft(tmp_path, "report", "a")
    assert (done.returncode, done.stdout) == (0, "a/report.html\n")
    done = ptft(tmp_path, "compare", "a")
    assert (done.returncode, done.stdout) == (2, "")
    assert ptft(tmp_path, "report", "no").stderr.startswith("error: no: no run directory")


def test_they_import_nothing_heavy(tmp_path: Path) -> None:
    two(tmp_path)
    heavy = {"torch", "transformers", "accelerate", "scipy", "plotly", "pandas", "datasets"}
    assert not imported(tmp_path, "compare", "a", "b", "--html", "x.html") & heavy


def test_a_run_writes_its_report(tmp_path: Path, cache: Path) -> None:
    write_tiny(tmp_path, "classification", log={"report": True}, train={"max_steps": 2}, eval={"every": 1})
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert "report           run/report.html\n" in run.stdout
    page = (tmp_path / "run/report.html").read_text()
    assert "finished after update 2" in Elements(page).text
    assert "classification" in Elements(page).text
    loss = next(chart for chart in data_of(page)["charts"] if chart["title"] == "loss")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    for curve, key in zip(loss["curves"], ("loss", "eval/loss"), strict=True):
        assert curve["y"] == pytest.approx([row[key] for row in rows if key in row], rel=1e-5)


def test_a_report_that_fails_does_not_fail_the_run(tmp_path: Path, cache: Path) -> None:
    write_tiny(tmp_path, "classification", log={"report": True}, train={"max_steps": 1}, eval={"every": None})
    (tmp_path / "run/report.html").mkdir(parents=True)
    run = start("train", "recipe.yaml", cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert "warning: the report was not written: " in run.stderr
    assert "Try again: ptft report run" in run.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "finished"
    assert list((tmp_path / "run").glob(".report*")) == []
