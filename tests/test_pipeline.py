"""Pipelines: which stages are done, in which order the others are, and what their references mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from pipeline_support import small_demo
from preloaded_ranks import forked_ptft
from support import eval_rows, start, write_recipe

import ptft_dist
from ptft_dist.api import input_fingerprint
from ptft_dist.config.shipped import shipped
from ptft_dist.errors import RecipeError
from ptft_dist.reporting.run_files import lock_run_dir
from ptft_dist.runs.pipeline import Pipeline, Stage, read_pipeline, run_here, table

STAGES = """\
out: {out}
stages:
  words: {{verb: tokenizer, recipe: recipe.yaml}}
  base:
    recipe: recipe.yaml
    set: {{tokenizer.train: null, tokenizer.path: "${{stage:words}}", optim.lr: {lr}}}
    launch: cpu_zero2
    show: [loss]
  more:
    recipe: recipe.yaml
    set:
      model.config: null
      model.path: "${{stage:base}}"
      tokenizer.train: null
      tokenizer.path: "${{stage:words}}"
  judge: {{verb: evaluate, recipe: recipe.yaml, model: "${{stage:more}}", show: [loss]}}
  other: {{recipe: recipe.yaml, set: {{optim.lr: 1e-3}}}}
"""
ALL = ["words", "base", "more", "judge", "other"]


@pytest.fixture
def folder(tmp_path: Path, documents: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    own = tmp_path / "text.txt"
    own.write_text(documents.read_text())
    write_recipe(tmp_path, own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTFT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def read(folder: Path, lr: str = "1e-3", again: Sequence[str] = ()) -> Pipeline:
    (folder / "steps.yaml").write_text(STAGES.format(out="runs", lr=lr))
    return read_pipeline("steps.yaml", again=again)


class Worker:
    """Does the work of a stage in no time; fails at one stage."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.did = fails, [""]
        self.did.clear()
        self.options: dict[str, list[str]] = {}

    def __call__(self, stage: Stage, options: Sequence[str]) -> int:
        self.did.append(stage.name)
        self.options[stage.name] = list(options)
        if stage.name == self.fails:
            return 3
        if stage.settings.verb == "evaluate":
            stage.output.write_text(json.dumps({"metrics": {"eval/loss": 1.5}}))
            return 0
        stage.output.mkdir()
        (stage.output / "tokenizer.json").write_text("{}")
        if stage.settings.verb == "train":
            loaded = stage.load()
            (stage.folder / "result.json").write_text('{"status": "finished"}')
            (stage.folder / "resolved.yaml").write_text(loaded.resolved)
            (stage.folder / "environment.json").write_text(json.dumps({"inputs": input_fingerprint(loaded)}))
            rows = ({"step": 0, "eval/loss": 4.0}, {"step": 1, "loss": 3.0}, {"step": 2, "eval/loss": 2.0})
            (stage.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return 0


def do(folder: Path, lr: str = "1e-3", again: Sequence[str] = (), fails: str = "") -> list[str]:
    """The stages that were done."""
    worker = Worker(fails)
    assert run_here(read(folder, lr, again), worker, ["--launch", "cpu", "--processes", "2"]) == (3 if fails else 0)
    return worker.did


def test_references_are_the_outputs_of_earlier_stages(folder: Path) -> None:
    words, base, more, judge, other = read(folder).stages
    runs, recipe = folder / "runs", str(folder / "recipe.yaml")
    assert words.command == ["tokenizer", recipe, "--out", f"{runs}/words/tokenizer"]
    assert base.load().recipe.tokenizer.path == f"{runs}/words/tokenizer"
    assert more.load().recipe.model.path == f"{runs}/base/model"
    assert more.command[-1] == f'run_dir="{runs}/more"'
    assert judge.command == ["evaluate", f"{runs}/more/model", recipe, "--out", f"{runs}/judge/metrics.json"]
    assert [stage.references for stage in (words, base, more, judge, other)] == [
        (), ("words",), ("base", "words"), ("more",), (),
    ]  # fmt: skip
    assert read_pipeline("steps.yaml", out="~/runs").out == Path.home() / "runs"


def test_a_stage_that_is_done_is_not_done_again(folder: Path) -> None:
    assert do(folder) == ALL
    assert do(folder) == []


def test_a_failure_holds_back_the_rest(folder: Path) -> None:
    assert do(folder, fails="more") == ALL[:3]
    assert do(folder) == ALL[2:]


def test_the_launch_config_of_a_stage_comes_first(folder: Path) -> None:
    worker = Worker()
    run_here(read(folder), worker, ["--launch", "cpu", "--processes", "2"])
    assert worker.options == {
        "words": [],
        "base": ["--launch", "cpu_zero2", "--processes", "2"],
        "more": ["--launch", "cpu", "--processes", "2"],
        "judge": [],
        "other": ["--launch", "cpu", "--processes", "2"],
    }


def test_a_change_is_refused_until_it_is_asked_for(folder: Path) -> None:
    """It changes the stages that depend on it; their old outputs are kept."""
    do(folder)
    with pytest.raises(RecipeError, match=r"stage base: its recipe, .* has changed .* --again base"):
        do(folder, lr="2e-3")
    assert json.loads((folder / "runs/base/result.json").read_text())["status"] == "finished"
    assert do(folder, lr="2e-3", again=["base"]) == ["base", "more", "judge"]
    assert (folder / "runs/base.1/model").is_dir()
    assert (folder / "runs/judge.1/metrics.json").exists()
    assert do(folder, lr="2e-3") == []
    assert do(folder, lr="2e-3", again=["judge"]) == ["judge"]
    assert (folder / "runs/judge.2/metrics.json").exists()


def test_again_that_was_stopped_leaves_no_stage_that_only_seems_done(folder: Path) -> None:
    do(folder)
    worker = Worker(fails="base")
    assert run_here(read(folder, again=["base"]), worker, []) == 3
    assert do(folder) == ["base", "more", "judge"]


def test_a_stage_that_has_read_another_recipe_is_not_done(folder: Path) -> None:
    """Such as one that was edited while the stage waited for its turn."""
    do(folder)
    (folder / "runs/other/resolved.yaml").write_text("task: clm\n")
    with pytest.raises(RecipeError, match="stage other: its recipe, its data or an earlier stage has changed"):
        do(folder)


def test_again_does_not_touch_what_is_still_running(folder: Path) -> None:
    do(folder)
    held = lock_run_dir(folder / "runs/more")
    with pytest.raises(RecipeError, match="another process is training in"):
        do(folder, again=["base"])
    held.release()
    assert not list((folder / "runs").glob("*.1"))


def test_a_variable_of_the_environment_is_part_of_what_a_stage_is_made_from(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keys() -> dict[str, str]:
        (folder / "steps.yaml").write_text(STAGES.format(out="runs", lr="1e-3, optim.schedule: '${env:SCHEDULE_9}'"))
        return dict(read_pipeline("steps.yaml").keys)

    monkeypatch.setenv("SCHEDULE_9", "constant")
    before = keys()
    monkeypatch.setenv("SCHEDULE_9", "linear")
    assert [name for name, key in keys().items() if key != before[name]] == ["base", "more", "judge"]


def test_changed_data_change_all_that_read_them(folder: Path) -> None:
    do(folder)
    with (folder / "text.txt").open("a") as file:
        file.write("one more document\n\n")
    with pytest.raises(RecipeError, match="stage words: "):
        do(folder)
    assert do(folder, again=["words", "other"]) == ALL


def test_a_directory_that_cannot_be_written_is_named(folder: Path) -> None:
    (folder / "runs").touch()
    with pytest.raises(RecipeError, match=rf"^out: {folder}/runs/words cannot be written: "):
        do(folder)


def test_a_failed_stage_may_be_repaired(folder: Path) -> None:
    """What has not finished is no output to lose."""
    do(folder, fails="base")
    assert do(folder, lr="2e-3") == ALL[1:]


def test_an_output_that_is_gone_is_made_again(folder: Path) -> None:
    do(folder)
    (folder / "runs/judge/metrics.json").unlink()
    assert do(folder) == ["judge"]


def test_the_table(folder: Path) -> None:
    do(folder)
    rows = [line.split() for line in table(read(folder))]
    assert rows == [["stage", "metric", "first", "last"], ["base", "loss", "4", "2"], ["judge", "loss", "1.5"]]


WRONG = {
    "": "the pipeline cannot be read|Input should be",
    "- a": "the pipeline cannot be read|Input should be",
    "out: x": "stages: Field required",
    "{out: x, stages: {}}": "stages: Dictionary should have at least 1 item",
    "{out: x, stages: {a: {recipe: recipe.yaml, sets: {}}}}": "stages.a.sets: Extra inputs are not permitted",
    "{out: x, stages: {a: {recipe: recipe.yaml, verb: pretrain}}}": "stages.a.verb: Input should be 'train'",
    "{out: x, stages: {../a: {recipe: recipe.yaml}}}": "stages.../a: use letters",
    "{out: x, stages: {a: {recipe: absent.yaml}}}": "stage a: absent.yaml: no such file",
    "{out: x, stages: {a: {recipe: recipe.yaml, set: {optim.lrr: 1}}}}": "stage a: .*optim.lrr: unknown key",
    '{out: x, stages: {a: {recipe: recipe.yaml, set: {model.path: "${stage:b}"}}, b: {recipe: recipe.yaml}}}':
        r"stages.a: \$\{stage:b\}: no such stage; there is no stage before it",
    "{out: x, stages: {a: {recipe: recipe.yaml, verb: evaluate}}}": "stages.a.model: needed by the verb evaluate",
    "{out: x, stages: {a: {recipe: recipe.yaml, model: m}}}": "stages.a.model: needed by the verb evaluate, and only",
    "{out: x, stages: {a: {recipe: recipe.yaml, verb: tokenizer, launch: cpu}}}": "stages.a.launch: without effect",
    "{out: x, stages: {a: {recipe: recipe.yaml, verb: tokenizer, show: [loss]}}}": "stages.a.show: the verb tokenizer",
    "{out: x, stages: {a: {recipe: recipe.yaml, verb: tokenizer, job: {nodes: 2}}}}": "stages.a.job.nodes: without",
    "{out: x, stages: {a: {recipe: recipe.yaml, set: {optim.lr: 2026-11-29}}}}": "stages.a.set: .*put dates in quotes",
    "{out: x, stages: {a.1: {recipe: recipe.yaml}}}": "stages.a.1: use letters",
    "{out: x, stages: {a: {recipe: recipe.yaml, job: {nodes: 0}}}}": "stages.a.job.nodes: Input should be greater",
    "{out: x, stages: {a: {recipe: recipe.yaml, set: {run_dir: elsewhere}}}}":
        "stages.a.set.run_dir: without effect, because a stage has the directory OUT/a; set out of the pipeline",
    "{out: x, stages: {a: {recipe: recipe.yaml, show: [loss, perplexty]}}}":
        "stages.a.show: task clm has no metric 'perplexty', only loss, .*; did you mean perplexity?",
    "{out: x, stages: {a: {recipe: recipe.yaml, verb: evaluate, model: m, show: [f1]}}}": "stages.a.show: task clm has",
    "{out: x, stages: {a: {recipe: recipe.yaml, set: {data.validation: null, eval: {}}, show: [loss]}}}":
        "stages.a.show: the recipe has no validation rows; set data.validation",
    **{f"{{out: x, stages: {{a: {{recipe: recipe.yaml, {more}, set: {{data.validation: null, data.folds: 2}}}}}}}}":
       "stages.a: data.folds: a stage is one run. Choose a fold with data.fold, or use data.validation"
       for more in ("verb: train", "verb: evaluate, model: m")},
    "a: [": "the pipeline cannot be read",
}  # fmt: skip


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_a_wrong_pipeline(folder: Path, text: str) -> None:
    (folder / "steps.yaml").write_text(text)
    with pytest.raises(RecipeError, match=WRONG[text]):
        read_pipeline("steps.yaml")


@pytest.mark.parametrize(
    "stage",
    [
        "{recipe: recipe.yaml, set: {data.validation: null, data.folds: 2, data.fold: 0}, show: [perplexity]}",
        "{recipe: recipe.yaml, verb: tokenizer, set: {data.validation: null, data.folds: 2}}",
        "{recipe: recipe.yaml, show: [router_loss]}",  # if the network has experts, which its recipe need not say
    ],
)
def test_a_right_pipeline(folder: Path, stage: str) -> None:
    (folder / "steps.yaml").write_text(f"{{out: x, stages: {{a: {stage}}}}}")
    assert len(read_pipeline("steps.yaml").stages) == 1


def test_an_unknown_stage_is_named(folder: Path) -> None:
    with pytest.raises(RecipeError, match="--again: bass: no such stage; the stages are words, base"):
        read(folder, again=["bass"])


@pytest.mark.parametrize("path", sorted(shipped("pipelines").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_pipelines_are_valid(tmp_path: Path, path: Path) -> None:
    done = forked_ptft("pipeline", path.stem, "--out", str(tmp_path), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("tokenizer    ptft tokenizer clm --out ")
    assert not list(tmp_path.iterdir())


def test_the_demo_ends_with_a_table_of_what_was_learned(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stages are small here; each starts from the outputs of those before."""
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    (tmp_path / "small.yaml").write_text(small_demo("out"))
    monkeypatch.chdir(tmp_path)
    stages = read_pipeline("small.yaml")

    def execute(stage: Stage, options: Sequence[str]) -> int:
        assert not options
        run = start(*stage.command, cwd=tmp_path, cache=cache, ranks=1)
        assert run.wait() == 0, run.stderr
        return 0

    assert run_here(stages, execute, []) == 0
    rows = [line.split() for line in table(stages)][1:]
    assert [(row[0], row[1]) for row in rows] == [
        ("clm", "perplexity"), ("sft", "perplexity"), ("reward", "accuracy"), ("ppo", "reward"), ("ppo", "kl"),
        ("evaluate", "perplexity"),
    ]  # fmt: skip
    for name, metric, first, last in rows[:-1]:
        seen = [row[f"eval/{metric}"] for row in eval_rows(tmp_path / "out" / name)]
        assert [float(first), float(last)] == pytest.approx([seen[0], seen[-1]], rel=1e-3, abs=1e-3)
    judge = stages.stages[-1]
    same = ptft_dist.evaluate(judge.recipe, judge.overrides, model=tmp_path / "out/ppo/model")
    assert float(rows[-1][-1]) == pytest.approx(same["eval/perplexity"], rel=1e-3)
    assert float(rows[-1][-1]) != float(rows[1][-1])  # the policy is no longer the chat model


def test_the_command_does_what_is_not_done(folder: Path) -> None:
    stages = "a: {verb: tokenizer, recipe: recipe.yaml}, b: {verb: tokenizer, recipe: other.yaml}"
    (folder / "steps.yaml").write_text(f"{{out: runs, stages: {{{stages}}}}}")
    (folder / "other.yaml").write_text((folder / "recipe.yaml").read_text())
    first = forked_ptft("pipeline", "steps.yaml", cwd=folder)
    assert first.returncode == 0, first.stderr
    (folder / "runs/b/tokenizer").rename(folder / "away")
    second = forked_ptft("pipeline", "steps.yaml", cwd=folder)
    assert "a: already done in" in second.stdout + second.stderr
    assert (folder / "runs/b/tokenizer/tokenizer.json").read_text() == (folder / "away/tokenizer.json").read_text()
    (folder / "recipe.yaml").write_text((folder / "other.yaml").read_text().replace("320", "300"))
    third = forked_ptft("pipeline", "steps.yaml", cwd=folder)
    assert (third.returncode, third.stderr[:16]) == (2, "error: stage a: ")
