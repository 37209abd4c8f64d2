"""`ptft evaluate --lm-eval` on local tasks: equal to our prompting and to lm-eval; code only if allowed."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prompting_support import LABELS, ROWS, TEMPLATE, loaded, naive_shots, save_model, write_recipe
from support import start
from tiny import write_rows

from ptft_dist import api
from ptft_dist.errors import DataError, RecipeError

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: {prompt}
doc_to_choice: {answers}
doc_to_target: "{{{{['animal', 'thing'].index(label)}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: acc_bytes}}]
"""
CODE = """
task: own_code
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
output_type: generate_until
generation_kwargs: {{max_gen_toks: 2, until: ["x"]}}
validation_split: validation
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{label}}}}"
unsafe_code: true
process_results: !function scoring.score
metric_list: [{{metric: passed, aggregation: mean, higher_is_better: true}}]
"""
SCORING = """
import os
from pathlib import Path

Path(__file__).with_name("imported").write_text("")

def score(doc, results):
    with Path(__file__).with_name("pids").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    return {"passed": float("cat" in doc["text"])}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PTFT_CACHE", str(cache))


@pytest.fixture(autouse=True, scope="module")
def _one_index_of_its_tasks() -> Iterator[None]:
    """lm-eval reads thousands of files to know its own tasks, which takes ten seconds: once is enough."""
    if find_spec("lm_eval") is None:
        yield
        return
    from lm_eval import tasks
    from lm_eval.tasks._index import TaskIndex

    own, build = Path(tasks.__file__).parent, TaskIndex.build
    kept: dict[str, Any] = {}

    def build_once(paths: Sequence[Path], **options: Any) -> dict[str, Any]:
        if own in paths and not kept:
            kept.update(build([own], **options))
        rest = build([path for path in paths if path != own], **options)
        return (kept if own in paths else {}) | rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskIndex, "build", staticmethod(build_once))
        yield


def write_task(folder: Path, name: str, before: str = "") -> None:
    folder.mkdir(exist_ok=True)
    rows = write_rows(folder.parent / "validation.jsonl", ROWS[40:])
    prompt = json.dumps(before + TEMPLATE.replace("{text}", "{{text}}"))
    answers = json.dumps(list(LABELS.values()))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name, rows=rows, prompt=prompt, answers=answers))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_without_lm_eval_it_says_what_to_install(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    monkeypatch.setattr("ptft_dist.judging.harness.find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r'lm-eval is not installed: pip install "ptft-dist\[lm-eval\]"'):
        api.evaluate_on_benchmarks(model, ["own"])
    done = start("evaluate", str(model), "--lm-eval-limit", "3", cwd=tmp_path, cache=cache)
    assert done.wait() == 2
    assert "they need --lm-eval TASK" in done.stderr


@pytest.mark.parametrize("shots", [0, 3])
def test_a_local_task_equals_prompting(model: Path, tmp_path: Path, shots: int) -> None:
    """On the same rows: log-likelihoods of all labels, accuracy, and accuracy by bytes."""
    pytest.importorskip("lm_eval")
    before = [
        TEMPLATE.format(text=row["text"]) + LABELS[row["label"]] + "\n\n" for row in naive_shots(ROWS[:40], shots)
    ]
    write_task(tmp_path / "tasks", "own", "".join(before))
    theirs = api.evaluate_on_benchmarks(model, ["own"], include="tasks", out="theirs.json")
    ours = api.evaluate_model(model, write_recipe(tmp_path, model, prompting={"shots": shots}), out="ours.json")
    assert theirs.tasks["own"]["acc"] == ours.metrics["eval/accuracy"]
    assert theirs.rows == {"own": 20}
    for row, line in zip(lines(tmp_path / "theirs.rows.jsonl"), lines(tmp_path / "ours.rows.jsonl"), strict=True):
        found = [float(total) for total, _ in row["filtered_resps"]]
        assert list(line["answer"]["log_likelihoods"].values()) == pytest.approx(found, abs=1e-4)
        assert row["acc"] == line["values"]["accuracy"][0]
    by_bytes = write_recipe(tmp_path, model, prompting={"shots": shots, "normalize": "bytes"})
    assert theirs.tasks["own"]["acc_bytes"] == api.evaluate_model(model, by_bytes).metrics["eval/accuracy"]
    assert json.loads((tmp_path / "theirs.json").read_text())["tasks"] == theirs.tasks


def test_an_adapter_is_evaluated_on_its_base(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    base, tokenizer = loaded(model)
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=16, init_lora_weights=False, target_modules="all-linear")
    get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    write_task(tmp_path / "tasks", "own")
    api.evaluate_on_benchmarks("adapter", ["own"], include="tasks", out="theirs.json")
    api.evaluate_model("adapter", write_recipe(tmp_path, model), out="ours.json")
    api.evaluate_model(model, write_recipe(tmp_path, model), out="base.json")
    changed = 0.0
    names = ("theirs", "ours", "base")
    for theirs, ours, alone in zip(*(lines(tmp_path / f"{name}.rows.jsonl") for name in names), strict=True):
        found = [float(total) for total, _ in theirs["filtered_resps"]]
        assert list(ours["answer"]["log_likelihoods"].values()) == pytest.approx(found, abs=1e-4)
        changed = max(changed, abs(found[0] - alone["answer"]["log_likelihoods"]["animal"]))
    assert changed > 0.1


def test_its_numbers_are_those_of_its_own_backend(model: Path, tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    write_task(tmp_path / "tasks", "own")
    ours = api.evaluate_on_benchmarks(model, ["own"], include="tasks")
    theirs = lm_eval.simple_evaluate(
        "hf",
        model_args={"pretrained": str(model), "device": "cpu"},
        tasks=["own"],
        task_manager=TaskManager(include_path="tasks", include_defaults=False),
        bootstrap_iters=1000,
    )
    assert theirs is not None
    for name, value in ours.tasks["own"].items():
        assert value == pytest.approx(theirs["results"]["own"][f"{name},none"], abs=1e-9), name


def test_the_command_prints_a_table(model: Path, tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("lm_eval")
    write_task(tmp_path / "tasks", "own")
    words = ["evaluate", str(model), "--lm-eval", "own", "--lm-eval-path", "tasks", "--lm-eval-limit", "4"]
    done = start(*words, cwd=tmp_path, cache=cache)
    assert done.wait() == 0, done.stderr
    table = [line.split() for line in done.stdout.splitlines()]
    assert table[0] == ["task", "rows", "shots", "metric", "value", "stderr"]
    assert [line[:4] for line in table[1:]] == [["own", "4", "0", name] for name in ("acc", "acc_norm", "acc_bytes")]


def test_unknown_tasks_and_missing_rows_are_named(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    write_task(tmp_path / "tasks", "own_task")
    with pytest.raises(RecipeError, match="lm-eval has no task 'own_tusk'; did you mean own_task"):
        api.evaluate_on_benchmarks(model, ["own_tusk"], include="tasks")
    with pytest.raises(RecipeError, match="--lm-eval-path: nowhere is no directory"):
        api.evaluate_on_benchmarks(model, ["own_task"], include="nowhere")
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(DataError, match="--lm-eval: own_task cannot be loaded"):
        api.evaluate_on_benchmarks(model, ["own_task"], include="tasks")


def test_code_runs_only_if_allowed_and_in_another_process(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = write_rows(tmp_path / "validation.jsonl", ROWS[40:44])
    (folder / "own_code.yaml").write_text(CODE.format(rows=rows))
    (folder / "group.yaml").write_text("group: own_group\ntask: [own_code]\n")
    (folder / "scoring.py").write_text(SCORING)
    for names, found in (
        (["own_code"], "own_code"),
        (["own_group", "own_c*", "humaneval"], "own_group, own_code, humaneval"),
    ):
        with pytest.raises(RecipeError, match=f"{found} runs code that the model writes.* allow it with --allow-code"):
            api.evaluate_on_benchmarks(model, names, include="tasks")
    assert not (folder / "imported").exists()
    result = api.evaluate_on_benchmarks(model, ["own_code"], include="tasks", allow_code=True)
    assert result.tasks["own_code"]["passed"] == sum("cat" in row["text"] for row in ROWS[40:44]) / 4
    pids = (folder / "pids").read_text().split()
    assert len(set(pids)) == 4
    assert str(os.getpid()) not in pids
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    assert sys.modules["lm_eval"]
