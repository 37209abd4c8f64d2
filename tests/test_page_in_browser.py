"""The pages of `ptft report` and `ptft compare` in Chromium: plots are drawn, and nothing is requested or reported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser, browser
from page_support import write_json_lines, write_run

import ptft_dist

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed: apt-get install chromium")
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(opened: Browser) -> Browser:
    """The browser of all tests, without the events of earlier ones."""
    opened.events.clear()
    return opened


def show(page: Browser, file: Path) -> None:
    """Open a page, and wait until all of its plots are drawn."""
    page.open(file)
    page.until("[...document.querySelectorAll('.chart')].every((each) => each.querySelector('.scatterlayer .trace'))")


def drawn(page: Browser, expression: str, chart: int = 0) -> Any:
    """An expression over `plot`, the element of a chart after Plotly has drawn it."""
    return page.run(f"((plot) => {expression})(document.getElementById('chart-{chart}'))")


def test_one_run(page: Browser, tmp_path: Path) -> None:
    file = ptft_dist.report(write_run(tmp_path / "run", losses=(4.0, 2.0)))
    show(page, file)
    assert page.run("document.querySelectorAll('.chart').length") == 4  # loss, accuracy, kl, learning rate
    assert drawn(page, "plot.data.map((each) => [each.name, each.x, each.y])") == [
        ["train", [1, 2], [3, 3]],
        ["eval", [0, 2], [4, 2]],
    ]
    assert drawn(page, "plot.querySelectorAll('.scatterlayer path.point').length") == 2
    assert page.requests() == [file.as_uri()]
    assert page.problems() == []
    assert page.run("document.getElementById('problem').hidden")


def test_several_runs(page: Browser, tmp_path: Path) -> None:
    """The curves of both, by update or by token, on a linear or a logarithmic axis; each run can be hidden."""
    runs = [write_run(tmp_path / name, losses=(4.0, 2.0)) for name in ("a", "b <b>")]
    ptft_dist.compare(runs, html=tmp_path / "both.html")
    show(page, tmp_path / "both.html")
    names = "plot.data.map((each) => each.name)"
    assert drawn(page, names) == ["a (train)", "a (eval)", "b &lt;b> (train)", "b &lt;b> (eval)"]
    axis = "plot.querySelector('.xtitle').textContent"
    assert drawn(page, f"[{axis}, plot.data[1].x]") == ["update", [0, 2]]
    choose = "const choice = document.getElementById('axis'); choice.value = 'tokens'"
    page.run(f"{{ {choose}; choice.dispatchEvent(new Event('change')); }}")
    assert drawn(page, f"[{axis}, plot.data[1].x]") == ["tokens", [0, 20]]
    page.run("document.querySelector('[data-log=\"0\"]').click()")
    assert [drawn(page, "plot.layout.yaxis.type", chart) for chart in (0, 1)] == ["log", "linear"]
    page.run("document.querySelector('[data-run=\"0\"]').click()")
    assert drawn(page, names) == ["b &lt;b> (train)", "b &lt;b> (eval)"]
    assert len(page.requests()) == 1
    assert page.problems() == []


def test_training_is_smoothed(page: Browser, tmp_path: Path) -> None:
    """Against a naive loop: the mean of all earlier values with weights 0.5, 0.25, ..."""
    run = write_run(tmp_path / "run")
    losses = [4.0, 2.0, 3.0, 1.0]
    write_json_lines(
        run / "metrics.jsonl", [{"step": i + 1, "loss": loss, "lr": 3e-4} for i, loss in enumerate(losses)]
    )
    show(page, ptft_dist.report(run))
    page.run("{ const input = document.getElementById('smoothing'); input.value = 0.5; }")
    page.run("document.getElementById('smoothing').dispatchEvent(new Event('input'))")
    weights = [0.5**i for i in range(4)]
    means = [sum(w * x for w, x in zip(weights, losses[i::-1], strict=False)) / sum(weights[: i + 1]) for i in range(4)]
    assert drawn(page, "plot.data[0].y") == pytest.approx(means)
    low, high = drawn(page, "plot.layout.yaxis.range", chart=1)  # of a constant learning rate
    assert 0 < low < 3e-4 < high < 1e-3


def test_texts_run_no_scripts(page: Browser, tmp_path: Path) -> None:
    """Neither as they are, nor if they were not escaped: the policy of the page allows two scripts."""
    run = write_run(tmp_path / "run")
    write_json_lines(run / "samples.jsonl", [{"step": 4, "text": HOSTILE}])
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace("eval/kl", f"eval/{HOSTILE}"))
    file = ptft_dist.report(run)
    show(page, file)
    assert page.problems() == []
    assert HOSTILE in page.run("document.body.textContent")
    assert page.run("window.hacked") is None
    file.write_text(file.read_text().replace("<main>", f"<main>{HOSTILE}<img src='https://example.org/x.png'>"))
    show(page, file)
    assert page.run("window.hacked") is None
    assert len(page.problems()) >= 3  # the policy refuses the script, the handler and the image


def test_buttons_send_nothing(page: Browser, tmp_path: Path) -> None:
    show(page, ptft_dist.report(write_run(tmp_path / "run")))
    titles = drawn(page, "[...plot.querySelectorAll('.modebar-btn')].map((each) => each.dataset.title)")
    assert len(titles) == 6
    assert not [title for title in titles if "cloud" in title.lower() or "share" in title.lower()]


def test_dark_light_and_paper(page: Browser, tmp_path: Path) -> None:
    ground = "getComputedStyle(plot.querySelector('.main-svg')).backgroundColor"
    file = ptft_dist.report(write_run(tmp_path / "run"))
    for scheme, expected in (("dark", "rgb(20, 24, 28)"), ("light", "rgb(255, 255, 255)")):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        show(page, file)
        assert drawn(page, ground) == expected
    width = "Number(plot.querySelector('.main-svg').getAttribute('width'))"
    page.run("dispatchEvent(new Event('beforeprint'))")
    assert drawn(page, width) == 340
    page.run("dispatchEvent(new Event('afterprint'))")
    assert drawn(page, width) > 400


def test_a_phone(page: Browser, tmp_path: Path) -> None:
    """No part is wider than the screen."""
    page.call("Emulation.setDeviceMetricsOverride", width=390, height=800, deviceScaleFactor=2, mobile=True)
    run = write_run(tmp_path / "run")
    (run / "recipe.yaml").write_text("x" * 2000)
    show(page, ptft_dist.report(run))
    assert page.run("document.documentElement.scrollWidth") == 390
    assert drawn(page, "Number(plot.querySelector('.main-svg').getAttribute('width'))") < 390
    page.call("Emulation.clearDeviceMetricsOverride")
