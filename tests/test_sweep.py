"""Sweeps: every trial once, the same table after a kill, pruning, failures, several workers, and the best recipe."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sweep_support
from preloaded_ranks import forked_ptft
from support import environment, start, wait_until
from sweep_support import UPDATES, loss
from tiny import write_tiny

from ptft_dist.api import load_recipe
from ptft_dist.errors import PtftError, RecipeError
from ptft_dist.runs import attempt, local
from ptft_dist.runs import sweep as sweeps
from ptft_dist.runs.attempt import Evaluations
from ptft_dist.runs.local import LocalExecutor
from ptft_dist.runs.search import read_search
from ptft_dist.runs.sweep import Sweep, finish, open_sweep, run_sweep

CHILD = (sys.executable, "-SsE", str(Path(sweep_support.__file__)))
SEARCH = "method: random\ntrials: 12\nsearch: {optim.lr: {log: [1e-4, 1e-1]}}\n"
PRUNE = "prune: {after: 2, startup: 3}\n"
RECIPE = """\
# A comment.
task: classification
model: {config: {model_type: bert}}
tokenizer: {train: {vocab_size: 300}}
data:
  train: [{path: rows.jsonl}]     # relative to this file
  validation: 0.1
batch: {global_size: 12, micro_size: 3}
optim:
  lr: 1e-3    # is varied
train: {max_steps: 8}
eval: {every: 1}
run_dir: run
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe with data, a search, and a child that trains in no time."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n')
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "search.yaml").write_text(SEARCH)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(local, "COMMAND", CHILD)
    monkeypatch.setattr(local, "WATCH_EVERY_S", 0.01)
    monkeypatch.setattr(attempt, "WATCH_EVERY_S", 0.01)
    return tmp_path


def opened(out: str = "run", search: str = SEARCH, *overrides: str) -> Sweep:
    Path("search.yaml").write_text(search)
    return open_sweep(read_search("search.yaml"), "recipe.yaml", overrides, out)


def swept(out: str = "run", search: str = SEARCH, workers: int = 1) -> dict[str, Any]:
    """The table of a sweep that is not interrupted."""
    sweep = opened(out, search)
    assert run_sweep(sweep, LocalExecutor(), [], workers=workers) == 0
    assert finish(sweep) == 0
    return table(out)


def table(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(out) / "sweep.json").read_text())
    return found


def started(out: str) -> list[int]:
    """How often each trial was started."""
    return [len(path.read_text()) for path in sorted(Path(out).glob("trial-*/starts"))]


def command(*words: str, pause_s: float = 0.0) -> subprocess.Popen[str]:
    """`ptft sweep` in a process group of its own, with the substitute for `ptft train`."""
    probe = (
        "import sys; from ptft_dist.runs import local; from ptft_dist.cli import main\n"
        f"local.COMMAND, local.WATCH_EVERY_S = {CHILD}, 0.01\n"
        "sys.argv[1:] = ['sweep', 'recipe.yaml', 'search.yaml', *sys.argv[1:]]; main()"
    )
    env = environment({"PAUSE_S": str(pause_s), "PTFT_CACHE": os.environ["PTFT_CACHE"]})
    return subprocess.Popen(
        [sys.executable, "-c", probe, *words], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


# --- the table --------------------------------------------------------------------------------------------------------


def test_every_trial_runs_once_and_the_best_comes_first(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "ptft"):
        found = swept()
    assert (found["metric"], found["goal"], found["method"]) == ("eval/loss", "min", "random")
    assert started("run") == [1] * 12
    rates = [row["parameters"]["optim.lr"] for row in found["trials"]]
    assert len(set(rates)) == 12
    assert [row["value"] for row in found["trials"]] == sorted(loss(lr, UPDATES) for lr in rates)
    assert sorted(row["trial"] for row in found["trials"]) == list(range(12))
    assert {(row["status"], row["updates"], row["exit_code"]) for row in found["trials"]} == {("finished", 8, None)}
    assert found["best"] == found["trials"][0]["trial"]
    lines = caplog.messages[-16:]
    assert lines[0].split() == ["trial", "optim.lr", "eval/loss", "updates", "status"]
    assert lines[1].split()[1:] == [f"{rates[0]:.4g}", f"{loss(rates[0], UPDATES):.4g}", "8", "finished"]
    assert lines[-1] == "next         ptft compare run/trial-*"


def test_the_best_recipe_trains_as_it_is(folder: Path) -> None:
    found = swept("elsewhere/sweep")
    text = Path("elsewhere/sweep/best.yaml").read_text()
    assert "\n# A comment.\n" in text
    assert "# relative to this file" in text
    assert "# is varied" in text
    best, given = load_recipe("elsewhere/sweep/best.yaml"), load_recipe("recipe.yaml")
    assert best.recipe.optim.lr == found["trials"][0]["parameters"]["optim.lr"]
    assert best.recipe.run_dir == "elsewhere/sweep/best"
    changes = {"optim": given.recipe.optim, "run_dir": given.recipe.run_dir}
    assert best.recipe.model_copy(update=changes) == given.recipe
    assert best.base == given.base  # rows.jsonl lies beside recipe.yaml
    checked = forked_ptft("config", "check", "elsewhere/sweep/best.yaml", cwd=folder)
    assert checked.returncode == 0, checked.stderr


def test_the_best_recipe_with_anchors_keeps_its_meaning() -> None:
    """The value of an anchor that others refer to cannot be edited in place."""
    text = RECIPE.replace("  lr: 1e-3    # is varied\n", "  lr: &rate 1e-3\n  eps: *rate\n")
    Path("recipe.yaml").write_text(text.replace("optim:", "optim: &all\n  weight_decay: 0.3", 1))
    found = swept()
    best = load_recipe("run/best.yaml").recipe
    assert (best.optim.lr, best.optim.eps) == (found["trials"][0]["parameters"]["optim.lr"], 1e-3)


def test_values_of_any_type_reach_the_trial_and_the_best_recipe() -> None:
    space = "{optim.lr: {choice: [0.002, 0.01]}, optim.betas: {choice: [[0.9, 0.99], null]}"
    found = swept(search=f"method: grid\nsearch: {space}, train.max_steps: {{int: [7, 8]}}}}\n")
    assert len(found["trials"]) == 8
    assert found["trials"][0]["parameters"] == {"optim.lr": 0.002, "optim.betas": [0.9, 0.99], "train.max_steps": 7}
    best = load_recipe("run/best.yaml").recipe
    assert (best.optim.lr, best.optim.betas, best.train.max_steps) == (0.002, (0.9, 0.99), 7)


def test_overrides_and_options_reach_every_trial() -> None:
    Path("search.yaml").write_text("metric: loss\nmethod: grid\nsearch: {optim.lr: {choice: [0.002, 0.01]}}\n")
    run = command("optim.eps=1e-9", "--launch", "cpu", "--processes", "2", "--out", "a run")
    _, stderr = run.communicate(timeout=120)
    assert run.returncode == 0, stderr
    for number, lr in enumerate(("0.002", "0.01")):
        found = json.loads(Path(f"a run/trial-{number:04d}/words.json").read_text())
        words = ["train", "recipe.yaml", "log.report=false", "optim.eps=1e-9", 'eval.metric="loss"', f"optim.lr={lr}"]
        assert found == [*words, f'run_dir="a run/trial-{number:04d}"', "--launch", "cpu", "--processes", "2"]
    best = load_recipe("a run/best.yaml").recipe
    assert (best.optim.eps, best.optim.lr) == (1e-9, 0.002)
    assert "(ptft train 'a run/best.yaml')" in stderr


def test_it_is_refused_inside_a_launcher(folder: Path, cache: Path) -> None:
    run = start("sweep", "recipe.yaml", "search.yaml", cwd=folder, cache=cache, ranks=2)
    assert run.wait() == 2
    assert "run it outside of a launcher" in run.stderr
    assert not Path("run").exists()


# --- interruptions ----------------------------------------------------------------------------------------------------


def progress(out: str) -> int:
    """Evaluations so far."""
    return sum(path.read_text().count("\n") for path in Path(out).glob("trial-*/metrics.jsonl"))


def test_a_killed_sweep_ends_with_the_same_table() -> None:
    search = (SEARCH + PRUNE).replace("random", "tpe\nstartup: 4")
    expected = swept("whole", search)
    assert {row["status"] for row in expected["trials"]} == {"finished", "pruned"}
    for evaluations in (20, 45):
        killed = command("--out", "run", pause_s=0.05)
        wait_until(lambda enough=evaluations: progress("run") >= enough, "some trials", 60)  # type: ignore[misc]
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        assert not Path("run/sweep.json").exists()
    last = command("--out", "run")
    _, stderr = last.communicate(timeout=120)
    assert last.returncode == 0, stderr
    assert table("run") == expected
    assert len(list(Path("run").glob("trial-*"))) == 12
    assert (
        Path("run/best.yaml").read_text().replace("run_dir: run/", "run_dir: whole/")
        == Path("whole/best.yaml").read_text()
    )


def test_a_trial_that_outlives_its_sweep_is_waited_for() -> None:
    """SIGKILL of the sweep does not reach the run, which has a session of its own."""
    killed = command("--out", "run", pause_s=1.0)
    wait_until(lambda: progress("run") >= 1, "the first trial", 60)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    Path("search.yaml").write_text(SEARCH.replace("12", "2"))
    last = command("--out", "run")
    _, stderr = last.communicate(timeout=120)
    assert last.returncode == 0, stderr
    assert "trial 0 of 2: waiting for a process of an earlier start that trains in run/trial-0000" in stderr
    assert len(Path("run/trial-0000/metrics.jsonl").read_text().splitlines()) == UPDATES


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_sweep_and_the_same_command_continues(number: signal.Signals) -> None:
    few = SEARCH.replace("12", "4")
    expected = swept("whole", few)
    stopped = command("--out", "run", pause_s=0.05)
    wait_until(lambda: progress("run") >= 12, "some trials", 60)
    stopped.send_signal(number)
    _, stderr = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, stderr
    done = len(list(Path("run").glob("trial-*")))
    assert json.loads(Path(f"run/trial-{done - 1:04d}/result.json").read_text())["status"] == "stopped"
    assert swept("run", few) == expected


def test_two_commands_share_the_trials() -> None:
    both = [command("--out", "run", pause_s=0.03) for _ in range(2)]
    texts = [each.communicate(timeout=120)[1] for each in both]
    assert [each.returncode for each in both] == [0, 0], texts
    assert started("run") == [1] * 12
    took = [sum(f"trial {number} of 12: run/" in text for number in range(12)) for text in texts]
    assert sum(took) == 12
    assert min(took) >= 2
    assert table("run")["trials"] == swept("alone")["trials"]


def at_once(out: str) -> int:
    """The largest number of trials that ran at the same time."""
    spans = [json.loads(path.read_text()) for path in Path(out).glob("trial-*/span")]
    return max(sum(began <= moment < ended for began, ended in spans) for moment, _ in spans)


def test_workers_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAUSE_S", "0.05")
    found = swept(workers=4)
    assert 2 <= at_once("run") <= 4
    assert started("run") == [1] * 12
    assert {path.read_text() for path in Path("run").glob("trial-*/train.log")} == {"trained\n"}
    monkeypatch.setenv("PAUSE_S", "0")
    assert found == swept("alone")
    assert not list(Path("alone").glob("trial-*/train.log"))
    assert at_once("alone") == 1


@pytest.mark.parametrize(
    ("visible", "workers", "shares"),
    [
        ("0,1,2,3", 2, ["0,2", "1,3"]),
        ("5,7", 3, ["5", "7", "5"]),
        ("", 2, [None, None]),
        ("0,1", 1, [None]),
    ],
)
def test_workers_divide_the_gpus(
    monkeypatch: pytest.MonkeyPatch, visible: str, workers: int, shares: list[str | None]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = [sweeps._share(worker, workers) for worker in range(workers)]
    assert [each.get("CUDA_VISIBLE_DEVICES") for each in found] == shares
    assert [("OMP_NUM_THREADS" in each) for each in found] == [workers > 1] * workers


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failed_trial_is_recorded_and_the_sweep_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "[[0.03, 5]]")
    found = swept()
    for row in found["trials"]:
        failed = row["parameters"]["optim.lr"] > 0.03
        assert row["status"] == ("failed" if failed else "finished")
        assert (row["exit_code"], row["value"] is None) == (5 if failed else None, failed)
    count = sum(row["status"] == "failed" for row in found["trials"])
    assert 0 < count < 12
    assert [row["status"] for row in found["trials"]][-count:] == ["failed"] * count
    assert started("run") == [1] * 12
    assert swept() == found
    assert started("run") == [1] * 12


def test_a_sweep_whose_trials_all_fail_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", "[[0, 5], [0.01, 77]]")
    sweep = opened(search=SEARCH.replace("12", "6"))
    assert run_sweep(sweep, LocalExecutor(), []) == 0
    with pytest.raises(PtftError, match=r"run: no trial has finished \(exit codes: 5, 77\)"):
        finish(sweep)
    assert len(table("run")["trials"]) == 6


@pytest.mark.parametrize("code", [2, 3, 4, 75, 76, 78])
def test_what_is_no_fault_of_the_values_ends_the_sweep(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setenv("FAILS", f"[[0, {code}]]")
    sweep = opened(search=SEARCH.replace("12", "3"))
    assert run_sweep(sweep, LocalExecutor(), []) == code
    assert [trial.status for trial in sweep.study.trials()] == ["unfinished"]
    monkeypatch.setenv("FAILS", "[]")
    assert run_sweep(sweep, LocalExecutor(), []) == 0
    assert started("run") == [2, 1, 1]


def test_a_result_without_a_finite_value_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    body = "import json, sys; run = json.loads(sys.argv[-1].partition('=')[2]);"
    body += 'open(run + \'/result.json\', \'w\').write(\'{"status": "finished", "metrics": {"eval/loss": NaN}}\')'
    monkeypatch.setattr(local, "COMMAND", (sys.executable, "-c", body))
    sweep = opened(search=SEARCH.replace("12", "2"))
    assert run_sweep(sweep, LocalExecutor(), []) == 0
    assert [(trial.status, trial.exit_code, trial.value) for trial in sweep.study.trials()] == [("failed", 0, None)] * 2


# --- what must not change ---------------------------------------------------------------------------------------------


def test_another_value_from_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCHEDULE_9", "constant")
    opened("run", SEARCH, "optim.schedule=${env:SCHEDULE_9}")
    monkeypatch.setenv("SCHEDULE_9", "linear")
    with pytest.raises(RecipeError, match=r"recipe: optim\.schedule: was .*SCHEDULE_9"):
        opened("run", SEARCH, "optim.schedule=${env:SCHEDULE_9}")


def test_another_recipe_search_or_data_are_refused() -> None:
    found = swept(search=SEARCH.replace("12", "2"))
    more = SEARCH.replace("12", "3")
    for search, says in [
        (more.replace("1e-4", "1e-3"), "search: search.optim.lr.log.0: was 0.0001, is 0.001"),
        (more + "seed: 1", "search: seed: was null, is 1"),
        (more.replace("random", "tpe"), 'search: method: was "random", is "tpe"'),
    ]:
        with pytest.raises(RecipeError, match="run: its trials belong to another recipe or search") as raised:
            opened(search=search)
        assert says in str(raised.value)
    with pytest.raises(RecipeError, match=r"recipe: optim\.weight_decay: was 0\.1, is 0\.5"):
        opened("run", more, "optim.weight_decay=0.5")
    with Path("rows.jsonl").open("a") as file:
        file.write('{"text": "c", "label": "x"}\n')
    with pytest.raises(RecipeError, match="the contents of the data or tokenizer files"):
        opened(search=more)
    Path("rows.jsonl").write_text("".join(Path("rows.jsonl").read_text().splitlines(keepends=True)[:2]))
    after = swept(search=more)
    assert len(after["trials"]) == 3
    assert [row for row in after["trials"] if row["trial"] < 2] == found["trials"]
    with pytest.raises(RecipeError, match=r"search\.yaml: trials: 3 trials exist in run, so 2 are too few"):
        opened(search=SEARCH.replace("12", "2"))


# --- pruning ----------------------------------------------------------------------------------------------------------


def pruned_by_median(rates: list[float], after: int, startup: int) -> list[int | None]:
    """By a naive loop: the update at which each trial is pruned."""
    finished: list[float] = []
    found: list[int | None] = []
    for lr in rates:
        at = None
        for step in range(after, UPDATES):
            best = min(loss(lr, each) for each in range(1, step + 1))
            if len(finished) >= startup and best > statistics.median(loss(other, step) for other in finished):
                at = step
                break
        found.append(at)
        if at is None:
            finished.append(lr)
    return found


def test_pruned_trials_are_those_of_the_median_rule(folder: Path) -> None:
    found = sorted(swept(search=SEARCH + PRUNE)["trials"], key=lambda row: row["trial"])
    rates = [row["parameters"]["optim.lr"] for row in found]
    expected = pruned_by_median(rates, after=2, startup=3)
    assert [row["updates"] if row["status"] == "pruned" else None for row in found] == expected
    assert 2 <= sum(at is not None for at in expected) <= 9
    for row, at in zip(found, expected, strict=True):
        assert row["value"] == loss(row["parameters"]["optim.lr"], at or UPDATES)
        assert not (folder / "run" / row["directory"] / "stop").exists()


def test_the_last_evaluation_prunes_nothing() -> None:
    """The second trial is better than the first one until the last evaluation."""
    rates = [0.005, 0.000995]
    better = [loss(rates[1], step) < loss(rates[0], step) for step in range(1, UPDATES + 1)]
    assert better == [True] * (UPDATES - 1) + [False]
    found = swept(search=f"method: grid\nsearch: {{optim.lr: {{choice: {rates}}}}}\nprune: {{startup: 1}}\n")
    assert [(row["trial"], row["status"]) for row in found["trials"]] == [(0, "finished"), (1, "finished")]


def test_a_pruned_trial_stops_early_and_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAUSE_S", "0.1")
    found = swept(search=SEARCH.replace("12", "6") + "prune: {after: 1, startup: 1}\n")
    pruned = [row for row in found["trials"] if row["status"] == "pruned"]
    assert pruned
    for row in pruned:
        assert len(Path(f"run/{row['directory']}/metrics.jsonl").read_text().splitlines()) < UPDATES


def test_hyperband_prunes() -> None:
    found = swept(search=SEARCH.replace("12", "8") + "prune: {method: hyperband}\n")
    assert {row["status"] for row in found["trials"]} == {"finished", "pruned"}


def test_pruning_needs_evaluations() -> None:
    with pytest.raises(RecipeError, match=r"search\.yaml: prune: has no effect here: it needs eval\.every"):
        opened("run", SEARCH + PRUNE, "eval.every=")


def test_evaluations_are_read_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = Evaluations(path, "eval/f1")
    assert reader.read() == []
    path.write_text('{"step": 0, "eval/f1": 0.1}\n{"step": 1, "loss": 2.0}\n{"step": 2, "eval/f1": 0.')
    assert reader.read() == [(0, 0.1)]
    with path.open("a") as file:
        file.write('5}\n{"step": 3, "loss": 1.0}\n')
    assert reader.read() == [(2, 0.5)]
    assert (reader.read(), reader.last_step) == ([], 3)
    # A resume replaces the file by its beginning, and writes the rest again.
    replacement = tmp_path / "new"
    replacement.write_text('{"step": 0, "eval/f1": 0.1}\n')
    replacement.replace(path)
    assert reader.read() == []
    with path.open("a") as file:
        file.write('{"step": 2, "eval/f1": 0.5}\n{"step": 4, "eval/f1": NaN}\n')
    ((step, value),) = reader.read()
    assert (step, value != value) == (4, True)


# --- real runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny(tmp_path, "classification", train={"max_steps": 4}, eval={"every": 1}, save={"every": 1, "keep": 1})
    (tmp_path / "search.yaml").write_text(
        "method: tpe\nstartup: 2\ntrials: 4\nmetric: accuracy\nsearch:\n  optim.lr: {log: [1e-5, 1e-1]}\n"
        "prune: {after: 1, startup: 1}\n"
    )
    return tmp_path


def test_a_real_sweep_killed_and_resumed(tiny: Path, cache: Path) -> None:
    words: dict[str, Any] = {"cwd": tiny, "cache": cache, "patches": ["fork_local_runs"]}
    whole = start("sweep", "recipe.yaml", "search.yaml", "--out", "whole", **words)
    assert whole.wait() == 0, whole.stderr
    killed = start("sweep", "recipe.yaml", "search.yaml", "--out", "run", **words)
    log = tiny / "run/trial-0001/metrics.jsonl"
    killed.until(lambda: log.exists() and log.stat().st_size > 0, "the second trial", 120)
    killed.kill()
    resumed = start("sweep", "recipe.yaml", "search.yaml", "--out", "run", **words)
    assert resumed.wait() == 0, resumed.stderr
    found = json.loads((tiny / "run/sweep.json").read_text())
    assert found == json.loads((tiny / "whole/sweep.json").read_text())
    assert len(found["trials"]) == 4
    for row in found["trials"]:
        if row["status"] == "finished":
            result = json.loads((tiny / "run" / row["directory"] / "result.json").read_text())
            assert result["metrics"]["eval/accuracy"] == row["value"]
            assert (
                f"lr: {row['parameters']['optim.lr']}" in (tiny / f"run/{row['directory']}/resolved.yaml").read_text()
            )
    shutil.copy(tiny / "run/best.yaml", tiny / "moved.yaml")  # also elsewhere
    best = start("train", "moved.yaml", cwd=tiny, cache=cache)
    assert best.wait() == 0, best.stderr
    result = json.loads((tiny / "run/best/result.json").read_text())
    assert result["metrics"]["eval/accuracy"] == found["trials"][0]["value"]


def test_a_shipped_search_runs_with_a_shipped_recipe(tmp_path: Path, cache: Path) -> None:
    small = ["train.max_steps=2", "eval.every=1", "eval.max_rows=8", "save.every=2", "data.train.0.limit=40"]
    small += ["data.validation=0.2", "batch.global_size=8", "batch.micro_size=4", "model.config.hidden_size=16"]
    run = start(
        "sweep", "classification", "lr", *small, "--out", "s", "--workers", "2", cwd=tmp_path, cache=cache,
        patches=["fork_local_runs"],
    )  # fmt: skip
    assert run.wait(300) == 0, run.stderr
    found = json.loads((tmp_path / "s/sweep.json").read_text())
    assert (len(found["trials"]), found["metric"], found["goal"]) == (12, "eval/f1_macro", "max")
    assert load_recipe(tmp_path / "s/best.yaml").recipe.run_dir == "s/best"
