"""Lists of runs, and the commands that read finished runs: `ptft checkpoints` and `ptft generate`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import environment, start, write_recipe
from tiny import write_tiny

import ptft_dist
from ptft_dist import api
from ptft_dist.checkpoint.checkpoint import Checkpoints, OneProcess
from ptft_dist.cli.checkpoints import checkpoints as command
from ptft_dist.errors import CheckpointError, DataError, PtftError
from ptft_dist.runs import local
from ptft_dist.runs.local import LocalExecutor
from ptft_dist.runs.run_list import Run, collect, is_finished, run_all

# --- lists of runs ----------------------------------------------------------------------------------------------------


class Recorder:
    """An executor that does not train: it returns these exit codes in order and records its calls."""

    def __init__(self, *codes: int) -> None:
        self.codes = list(codes)
        self.calls: list[tuple[str, list[str]]] = []

    def __call__(self, run: Run, options: Sequence[str]) -> int:
        self.calls.append((run.name, list(options)))
        return self.codes.pop(0)


def runs_in(folder: Path, *names: str, recipe: str = "recipe.yaml") -> list[Run]:
    return [Run(name, recipe, (), folder / name) for name in names]


def test_runs_are_trained_in_order(tmp_path: Path) -> None:
    executor = Recorder(0, 0, 0)
    assert run_all(runs_in(tmp_path, "b", "a", "c"), ["--accept", "optim.lr"], executor) == 0
    assert executor.calls == [(name, ["--accept", "optim.lr"]) for name in ("b", "a", "c")]


@pytest.mark.parametrize("code", [1, 3, 75])
def test_a_run_that_does_not_finish_ends_the_list(tmp_path: Path, code: int, caplog: pytest.LogCaptureFixture) -> None:
    executor = Recorder(0, code)
    with caplog.at_level("INFO", "ptft"):
        assert run_all(runs_in(tmp_path, "a", "b", "c"), [], executor) == code
    assert [name for name, _ in executor.calls] == ["a", "b"]
    assert caplog.messages == [f"b ended with exit code {code}. The same command continues with it."]
    caplog.clear()
    with caplog.at_level("INFO", "ptft"):
        run_all(runs_in(tmp_path, "a"), ["--resume", "never"], Recorder(code), skip_finished=False)
    assert caplog.messages == [
        f"a ended with exit code {code}. The same command without --resume never continues with it."
    ]


def test_a_run_is_a_command(tmp_path: Path) -> None:
    """A run_dir with every sign that YAML could read otherwise stays what it is."""
    write_tiny(tmp_path, "classification")
    odd = tmp_path / 'it\'s: [a] #1, "x" \u00e4'
    run = Run("odd", str(tmp_path / "recipe.yaml"), ("optim.lr=0.5",), odd)
    assert run.words[:2] == [str(tmp_path / "recipe.yaml"), "optim.lr=0.5"]
    loaded = run.load()
    assert (Path(loaded.recipe.run_dir), loaded.recipe.optim.lr) == (odd, 0.5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its data, a local tokenizer and a finished run of it, run/a."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny(folder, "classification", train={"max_steps": 1}, eval={"every": None}, save={"every": None})
    first = start("prepare", "recipe.yaml", cwd=folder, cache=folder / "cache")
    assert first.wait() == 0, first.stderr
    (learned,) = [path for path in (folder / "cache/tokenizers").iterdir() if path.is_dir()]
    learned.rename(folder / "tokenizer")
    (folder / "synonyms.txt").write_text("red\tcrimson\n")
    recipe = json.loads((folder / "recipe.yaml").read_text())
    recipe |= {"tokenizer": {"path": "tokenizer"}, "run_dir": "run/a"}
    recipe.setdefault("optim", {})["schedule"] = "${env:SCHEDULE_9:-constant}"
    recipe["data"]["augment"] = [{"method": "synonym", "synonyms": "synonyms.txt"}]
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    run = start("train", "recipe.yaml", cwd=folder, cache=folder / "cache")
    assert run.wait() == 0, run.stderr
    return folder


@pytest.fixture
def finished(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The finished run, with the folder of its recipe as current directory."""
    monkeypatch.chdir(trained)
    monkeypatch.setenv("PTFT_CACHE", str(trained / "cache"))
    return Run("a", "recipe.yaml", (), Path("run/a"))


def test_a_finished_run_is_skipped(finished: Run) -> None:
    assert is_finished(finished)
    executor = Recorder(0)
    assert run_all([finished], [], executor) == 0
    assert executor.calls == []
    assert run_all([finished], [], executor, skip_finished=False) == 0
    assert executor.calls == [("a", [])]


CHANGES = {
    "a data file": ("rows.jsonl", '{"text": "one more", "label": "red"}\n'),
    "the tokenizer": ("tokenizer/tokenizer_config.json", "\n"),
    "the synonyms": ("synonyms.txt", "cat\ttomcat\n"),
    "the recipe": ("run/a/resolved.yaml", "# other\n"),
}


@pytest.mark.parametrize("changed", CHANGES)
def test_a_run_of_other_inputs_is_not_finished(finished: Run, changed: str) -> None:
    name, text = CHANGES[changed]
    before = Path(name).read_text()
    Path(name).write_text(before + text)
    try:
        assert not is_finished(finished)
    finally:
        Path(name).write_text(before)
    assert is_finished(finished)


@pytest.mark.parametrize("lost", ["result.json", "resolved.yaml", "environment.json"])
def test_a_run_without_its_files_is_not_finished(finished: Run, lost: str) -> None:
    path = finished.run_dir / lost
    path.rename(path.with_suffix(".aside"))
    try:
        assert not is_finished(finished)
    finally:
        path.with_suffix(".aside").rename(path)
    assert is_finished(finished)


def test_a_run_with_other_values_is_not_finished(finished: Run) -> None:
    assert not is_finished(Run("a", "recipe.yaml", ("eval.every=7",), finished.run_dir))


def test_a_run_with_another_value_from_the_environment_is_not_finished(
    finished: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of the run name the variable, because its value may be secret."""
    monkeypatch.setenv("SCHEDULE_9", "linear")
    assert not is_finished(finished)
    monkeypatch.setenv("SCHEDULE_9", "constant")
    assert is_finished(finished)


@pytest.mark.parametrize("status", ["stopped", "failed"])
def test_a_run_that_was_stopped_is_not_finished(finished: Run, status: str) -> None:
    path = finished.run_dir / "result.json"
    before = path.read_text()
    path.write_text(json.dumps(json.loads(before) | {"status": status}))
    try:
        assert not is_finished(finished)
        with pytest.raises(PtftError, match=r"^a: no finished result"):
            collect([finished])
    finally:
        path.write_text(before)


def test_data_that_are_gone_are_named(finished: Run) -> None:
    Path("rows.jsonl").rename("gone.jsonl")
    try:
        with pytest.raises(DataError, match=r"rows\.jsonl"):
            is_finished(finished)
    finally:
        Path("gone.jsonl").rename("rows.jsonl")


def test_results_are_collected_in_order(tmp_path: Path) -> None:
    runs = runs_in(tmp_path, "b", "a")
    for steps, run in enumerate(runs):
        run.run_dir.mkdir()
        (run.run_dir / "result.json").write_text(json.dumps({"status": "finished", "steps": steps}))
    assert [result["steps"] for result in collect(runs)] == [0, 1]
    (tmp_path / "a/result.json").write_text('{"status": "fin')
    with pytest.raises(PtftError, match=r"^a, c: no finished result in the run directory"):
        collect([*runs, *runs_in(tmp_path, "c")])


def test_runs_needs_no_torch() -> None:
    probe = "import sys, ptft_dist.runs.folds, ptft_dist.runs.sweep\n"
    probe += "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", probe], check=True, env=environment())


# --- the local executor -----------------------------------------------------------------------------------------------


def child(body: str) -> tuple[str, ...]:
    """A substitute for `ptft train`, called with the arguments of the run and the options."""
    return (sys.executable, "-c", body)


def test_a_process_gets_the_run_and_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "import json, sys; json.dump(sys.argv[1:], open('words.json', 'w')); sys.exit(3)"
    monkeypatch.setattr(local, "COMMAND", child(body))
    monkeypatch.chdir(tmp_path)
    assert LocalExecutor()(Run("a", "clm", ("optim.lr=1",), Path("run/a")), ["--resume", "never"]) == 3
    assert json.loads(Path("words.json").read_text()) == [
        "train",
        "clm",
        "optim.lr=1",
        'run_dir="run/a"',
        "--resume",
        "never",
    ]


# What a process does with the signal, and the exit codes of both runs of a list.
ENDINGS = {
    "saves": ("sys.exit(75)", [75, 75]),
    "fails while it saves": ("sys.exit(4)", [4, 75]),
    "had just finished": ("sys.exit(0)", [0, 75]),
    "had not begun to train": ("sys.exit(128 + number)", [75, 75]),
}


@pytest.mark.parametrize("number", local.SIGNALS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_signal_stops_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, number: signal.Signals
) -> None:
    """The process signals its parent, which forwards the signal."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    end, codes = ENDINGS[ending]
    body = (
        f"import os, signal, sys, time\nnumber = {int(number)}\n"
        f"signal.signal(number, lambda *_: {end})\n"
        "open('started', 'a').write('x')\nos.kill(os.getppid(), number)\ntime.sleep(60)"
    )
    monkeypatch.setattr(local, "COMMAND", child(body))
    monkeypatch.chdir(tmp_path)
    executor, before = LocalExecutor(), [signal.getsignal(each) for each in local.SIGNALS]
    with executor.forwarding_signals():
        assert [executor(run, []) for run in runs_in(tmp_path, "a", "b")] == codes
    assert Path("started").read_text() == "x"
    assert [signal.getsignal(each) for each in local.SIGNALS] == before


def test_a_killed_process_is_no_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL, or a SIGTERM that did not come through here: the exit code is the shell's."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        monkeypatch.setattr(local, "COMMAND", child(f"import os; os.kill(os.getpid(), {int(number)})"))
        assert LocalExecutor()(Run("a", "clm", (), tmp_path), []) == 128 + number


# --- ptft checkpoints -------------------------------------------------------------------------------------------------

JUDGE = {"metric": "loss", "larger_is_better": False, "rows": "abc"}
# What versions until 0.1 and this version write about the best checkpoint, step 4.
PROGRESS: dict[str, dict[str, Any]] = {
    "0.1": {"best": 0.5, "best_step": 4},
    "now": {
        "best": {"judge": JUDGE, "step": 6, "value": 0.4, "metrics": {"eval/loss": 0.4}},
        "best_checkpoint": {"judge": JUDGE, "step": 4, "value": 0.5, "metrics": {"eval/loss": 0.5}},
    },
}


def committed(run_dir: Path, progress: dict[str, Any], *steps: int) -> None:
    """Checkpoints of 1 MB, of which the newest one alone knows the progress."""
    for step in steps:
        facts = {"kind": "zero2", "world_size": 4, "progress": progress if step == max(steps) else {}}
        Checkpoints(run_dir / "checkpoints").commit(step, write, facts, OneProcess())


def write(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(1_000_000))


@pytest.mark.parametrize("version", PROGRESS)
def test_checkpoints_shows_the_best(tmp_path: Path, capsys: pytest.CaptureFixture[str], version: str) -> None:
    committed(tmp_path, PROGRESS[version], 2, 4, 6)
    command(tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "step-00000002  zero2 x 4  1.0 MB  good",
        "step-00000004  zero2 x 4  1.0 MB  best  good",
        "step-00000006  zero2 x 4  1.0 MB  good",
    ]


@pytest.mark.parametrize("progress", [{}, {"best_step": None}, {"best": None, "best_checkpoint": None}])
def test_checkpoints_without_a_best(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: dict[str, Any]
) -> None:
    committed(tmp_path, progress, 2, 4)
    command(tmp_path)
    assert "best" not in capsys.readouterr().out


def test_checkpoints_shows_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The damaged newest checkpoint does not hide which one is the best: the one before it says so too."""
    committed(tmp_path, PROGRESS["now"], 2, 4)
    committed(tmp_path, PROGRESS["now"], 6)
    torn = tmp_path / "checkpoints/step-00000006/manifest.json"
    torn.write_text(torn.read_text()[:100])
    with pytest.raises(CheckpointError, match="1 of 3 checkpoints are damaged"):
        command(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "step-00000004  zero2 x 4  1.0 MB  best  good"
    assert "manifest.json cannot be read" in lines[-1]


def test_checkpoints_of_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoints contains no checkpoint"):
        command(tmp_path)


# --- ptft generate ----------------------------------------------------------------------------------------------------


def test_generate_from_python(tmp_path: Path, documents: Path, cache: Path) -> None:
    """Greedy decoding equals a naive loop, and the state of the process is restored."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    folder = write_recipe(tmp_path, documents, train={"max_steps": 1}, eval={"every": None}, save={"every": None})
    run = start("train", folder.name, cwd=tmp_path, cache=cache)
    assert run.wait() == 0, run.stderr
    state, bars = torch.random.get_rng_state(), logging.is_progress_bar_enabled()
    text = ptft_dist.generate(tmp_path / "run", "abc", max_new_tokens=4, temperature=0.0)
    sampled = [ptft_dist.generate(tmp_path / "run/model", "abc", max_new_tokens=4, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert logging.is_progress_bar_enabled() == bars
    assert sampled[0] == sampled[1] != sampled[2]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/model")
    ids = tokenizer("abc", add_special_tokens=False, return_tensors="pt").input_ids
    for _ in range(4):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, r"there is no model. A finished run writes it to .*model"),
        ('{"architectures": ["BertForMaskedLM"]}', "BertForMaskedLM cannot generate text"),
        (
            '{"architectures": ["BertForSequenceClassification"]}',
            r"cannot generate text.* Its answers to rows: ptft predict \S*test_generate\S+ --file rows\.jsonl",
        ),
        ('{"architectures": ["XLNetLMHeadModel"]}', "XLNetLMHeadModel cannot generate text"),
        ("{}", "a network of unknown architecture cannot generate text"),
        ('{"archi', r"config\.json cannot be read"),
    ],
)
def test_generate_names_what_is_missing(tmp_path: Path, config: str | None, says: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=says):
        api.generate(tmp_path, "abc")


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with LocalExecutor().forwarding_signals():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert callable(signal.getsignal(signal.SIGTERM))
