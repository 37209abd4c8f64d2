"""What `ptft train` shows: a bar on a terminal, plain lines elsewhere, the results on stdout, and how to continue."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shlex
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import last_step, start, write_recipe

from ptft_dist.api import load_recipe
from ptft_dist.cli.train import _train_rank
from ptft_dist.reporting import messages, terminal
from ptft_dist.reporting.messages import LIVE, progress, say, show_messages
from ptft_dist.reporting.summary import continuing, results
from ptft_dist.reporting.terminal import Terminal
from ptft_dist.run import Result

TRAIN = {"lr": 1e-3, "tokens_per_s": 12345.6}


class Screen:
    """A terminal of 100 columns as stderr, and what a user sees there."""

    def __init__(self) -> None:
        self.reading, self.writing = pty.openpty()
        fcntl.ioctl(self.writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.stderr = os.fdopen(self.writing, "w")
        self.received = ""

    def lines(self) -> list[str]:
        """The lines as they are now: a carriage return and `erase line` empty the last one."""
        self.stderr.flush()
        os.set_blocking(self.reading, False)
        while True:
            try:
                self.received += os.read(self.reading, 65536).decode()
            except BlockingIOError:
                break
        shown = [""]
        for part in re.split(r"(\r\x1b\[2K|\r\n)", self.received):
            if part == "\r\n":
                shown.append("")
            elif part == "\r\x1b[2K":
                shown[-1] = ""
            else:
                shown[-1] += part
        return shown


@contextlib.contextmanager
def on_a_screen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Screen]:
    """Not a fixture: pytest replaces sys.stderr when the test begins."""
    made = Screen()
    monkeypatch.setattr(sys, "stderr", made.stderr)
    monkeypatch.setattr(messages.time, "monotonic", lambda: 1000.0)
    show_messages()
    try:
        yield made
    finally:
        messages.hide_messages()
        LIVE.text = ""
        os.close(made.reading)


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_a_screen(monkeypatch) as screen:
        shown = Terminal(200, 0, "accuracy")
        monkeypatch.setattr(terminal.time, "monotonic", lambda: 1030.0)  # 30 s for 50 of 200 updates: 90 s are left
        shown.write({"step": 50, "loss": 2.5, **TRAIN})
        (bar,) = screen.lines()
        assert bar.startswith(" 25% ")
        assert bar.endswith(" step 50/200  loss 2.5000  12,346 tokens/s  1:30 left")
        assert len(bar) == 99
        filled = bar[5 : bar.index(" step")]
        assert filled.count("█") == len(filled) // 4

        say("a message")  # above the bar
        assert screen.lines() == ["a message", bar]

        metrics = {"eval/loss": 1.5, "eval/accuracy": 0.875, "eval/f1": 0.5, "eval/time_s": 3.0}
        shown.write({"step": 50, **metrics})
        *above, bar = screen.lines()
        assert above == ["a message", "step 50/200  eval/loss 1.5  eval/accuracy 0.875"]
        assert bar.endswith(" step 50/200  loss 2.5000  12,346 tokens/s  1:30 left  eval/accuracy 0.875")

        shown.write({"step": 51, "loss": 2.25, **TRAIN})
        *_, bar = screen.lines()
        assert bar.endswith("  loss 2.2500  12,346 tokens/s  1:28 left  eval/accuracy 0.875")  # 30 s / 51 * 149
        assert len(bar) == 99

        with progress("evaluating", 10, "micro-batches") as other:  # takes the place of the bar for a while
            monkeypatch.setattr(messages.time, "monotonic", lambda: 1031.0)
            other.advance(5)
            assert screen.lines()[-1] == "evaluating: 5 of 10 (50%) micro-batches, 0:01"
        assert screen.lines()[-1] == bar
        shown.close()
        assert screen.lines()[-2:] == [bar, ""]


def test_plain_lines_with_the_time_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Terminal(200, 0, "accuracy")
    for step in (1, 2, 3):
        shown.write({"step": step, "loss": 2.5, **TRAIN})
    shown.write({"step": 3, "eval/loss": 1.5, **{f"eval/metric-{i}": 0.1 for i in range(9)}, "eval/accuracy": 0.875})
    shown.write({"step": 200, "loss": 2.5, **TRAIN})
    shown.close()
    lines = capsys.readouterr().err.splitlines()
    clocks, texts = zip(*(line.split("  ", 1) for line in lines if line), strict=True)
    assert all(re.fullmatch(r"\d\d-\d\d \d\d:\d\d:\d\d", each) for each in clocks)
    assert texts[1] == "step 3/200  eval/loss 1.5  eval/accuracy 0.875"
    assert texts[2] == "step 200/200  loss 2.5000  12,346 tokens/s  0:00 left"
    assert len(texts) == 3  # updates 2 and 3 came within ten seconds
    assert all(len(line) <= 100 for line in lines)


@pytest.mark.parametrize("kind", ["terminal", "pipe"])
def test_training_outlives_its_terminal(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Also `tee`, which ends at Ctrl-C before the run has saved."""
    reading, writing = pty.openpty() if kind == "terminal" else os.pipe()
    with os.fdopen(writing, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        shown = Terminal(200, 0, "accuracy")
        os.close(reading)
        shown.write({"step": 50, "loss": 2.5, **TRAIN})
        show_messages()
        say("a message")
        shown.write({"step": 50, "eval/loss": 1.5, "eval/time_s": 3.0})
        shown.close()
        messages.hide_messages()
        stderr.flush()  # as the interpreter does at its end


def test_a_finished_run_without_a_reader_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, documents: Path
) -> None:
    result = Result("finished", "all updates done", 1, tmp_path, tmp_path, {}, 1, None, [], "the summary")
    monkeypatch.setattr("ptft_dist.run.run", lambda *_args, **_options: result)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert _train_rank(load_recipe(write_recipe(tmp_path, documents)), "auto", ()) == 0


def result_lines(first: dict[str, float], **more: Any) -> list[str]:
    metrics = {"eval/loss": 2.259, "eval/perplexity": 9.575, "eval/other": 1.0}
    given = {"model": Path("runs/a b/model"), "generates": True} | more
    return results(Path("runs/a b"), metrics, first, "perplexity", **given).splitlines()


def test_results() -> None:
    assert result_lines({"eval/loss": 5.778, "eval/perplexity": 323.0}) == [
        "eval/perplexity  323 -> 9.575 (-313.4)",
        "eval/loss        5.778 -> 2.259 (-3.519)",
        "model            runs/a b/model",
        "metrics          runs/a b/metrics.jsonl",
        "next             ptft generate 'runs/a b' --prompt TEXT",
        "                 ptft evaluate 'runs/a b'",
        "                 ptft tensorboard 'runs/a b'",
    ]
    single = result_lines({"eval/loss": 2.259, "eval/perplexity": 9.575, "eval/other": 1.0}, model=None)
    assert single == [
        "eval/perplexity  9.575",
        "eval/loss        2.259",
        "metrics          runs/a b/metrics.jsonl",
        "next             ptft tensorboard 'runs/a b'",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ptft", "train", "clm", "run_dir=a b"], "continue with: ptft train clm 'run_dir=a b'"),
        (["/x/__main__.py", "train", "r.yaml", "--resume", "never", "--launch", "cpu"],
         "continue with: ptft train r.yaml --launch cpu"),
        (["/bin/ptft", "train", "--resume=never", "r.yaml"], "continue with: ptft train r.yaml"),
        (["notebook.py"], "continue with the same call"),
    ],
)  # fmt: skip
def test_how_to_continue(words: list[str], expected: str) -> None:
    assert continuing(words) == expected
    assert continuing(words, in_job=True) == f"a requeued job resumes; otherwise {expected}"  # or an interactive job


def test_a_stopped_run_says_how_to_continue_and_results_are_on_stdout(
    tmp_path: Path, documents: Path, cache: Path
) -> None:
    write_recipe(tmp_path, documents, train={"max_steps": 20})
    words = ["train", "recipe.yaml", "optim.lr=0.003", "--resume", "never"]
    run = start(*words, cwd=tmp_path, cache=cache, patches=["slow_updates:0.1"])
    run.until(lambda: last_step(tmp_path / "run") >= 5, "update 5")
    (tmp_path / "run/stop").touch()
    assert run.wait() == 75
    said = re.search(r"after update (\d+); saved to (\S+); continue with: (.*)", run.stderr)
    assert said is not None, run.stderr
    assert (tmp_path / said[2] / "manifest.json").is_file()

    run = start(*shlex.split(said[3])[1:], cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    assert "finished after update 20" in run.stderr
    assert run.stdout.startswith("eval/loss        ")
    assert "next             ptft generate run --prompt TEXT\n" in run.stdout
    assert "tokens/s" not in run.stdout
